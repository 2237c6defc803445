"""The matmul of few tokens on Hopper GPUs (Pallas Mosaic GPU): the weight streams through shared memory once, at the memory's rate.

The weight is cut into tiles of 64 outputs and each tile, along its inputs, into blocks. All blocks, tile by tile, are dealt out in equal
runs to blocks of threads that stay for the whole kernel (stream-K, Osama et al., arXiv 2301.03598), one per multiprocessor: a producer
copies (TMA), a consumer multiplies (wgmma, the weight on the left so that few tokens fill the tensor cores). Where a run ends inside a
tile, the tile's sums come in several parts, which whatever consumes them adds up in order. Who does what is known from the static shapes,
so a token's result depends on nothing else. Many tokens are XLA's, which has the vendor's kernels for them, and so is one.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import dispatch, hopper
from pallas_kernels.dense_matmul import xla
from pallas_kernels.hopper import TILE

FEWEST, MOST = 2, 128  # tokens
CONSUMER, PRODUCER = 200, 40  # registers of a thread
BLOCKS = (256, 128, 64)  # inputs of a block, best first


class Plan(NamedTuple):
    """Static shape: `tiles` tiles of `consumers` x 64 outputs, each of `length` blocks of `block` inputs, dealt out to `workers`."""

    tiles: int
    length: int
    block: int
    workers: int
    consumers: int
    stages: int
    tokens: int

    @property
    def total(self) -> int:
        """Blocks of the whole weight."""
        return self.tiles * self.length

    def owner(self, number: Any) -> Any:
        """Who has a block."""
        return ((number + 1) * self.workers - 1) // self.total

    def parts(self) -> np.ndarray:
        """Of how many workers each tile has sums."""
        begin = np.arange(self.tiles, dtype=np.int64) * self.length
        return self.owner(begin + self.length - 1) - self.owner(begin) + 1


class Scratch(NamedTuple):
    """Shared memory and barriers, once per stage."""

    weight: Any
    x: Any
    full: Any
    free: Any


def refusal(target: dispatch.Target, key: dispatch.Key) -> str | None:
    """Why this cannot run on a target, or for what is known of a key; None when it can."""
    features, outputs = int(key.get("in", TILE)), int(key.get("out", TILE))
    reason = hopper.refusal(target, {"dtype": key.get("dtype", "bfloat16")})
    if reason is not None:
        return reason
    if features % BLOCKS[-1] or outputs % TILE:
        return f"its kernel needs inputs and outputs in multiples of {BLOCKS[-1]}, not {features} and {outputs}"
    return None


def by_name(key: dispatch.Key) -> str | None:
    """Why "auto" passes this over."""
    return "in whole steps it was no faster than XLA; ask for it by name"


def plan_of(tokens: int, outputs: int, features: int) -> Plan:
    """How a weight [outputs, features] is dealt out for so many tokens (a multiple of 8)."""
    consumers = 2 if tokens > TILE and outputs % (2 * TILE) == 0 else 1
    fitting = [block for block in BLOCKS if features % block == 0 and block * (tokens + consumers * TILE) * 2 * 3 <= hopper.SHARED_BYTES]
    block = fitting[0] if tokens <= 16 else next((block for block in fitting if block <= 128), fitting[0])
    stages = (hopper.SHARED_BYTES - 1024) // (block * (tokens + consumers * TILE) * 2)
    tiles, length = outputs // (consumers * TILE), features // block
    return Plan(tiles, length, block, min(hopper.cores(), tiles * length), consumers, stages, tokens)


def dense_matmul(x: Float[Array, "tokens in"], weight: Float[Array, "out in"], *, out_dtype: DTypeLike) -> Float[Array, "tokens out"]:
    """See api.dense_matmul."""
    tokens = x.shape[0]
    if not FEWEST <= tokens <= MOST:
        return xla.dense_matmul(x, weight, out_dtype=out_dtype)
    plan = plan_of(tokens + -tokens % 8, *weight.shape)
    parts = _parts(jnp.pad(x, ((0, plan.tokens - tokens), (0, 0))), weight, plan=plan, interpreted=hopper.interpreting())
    count = np.repeat(plan.parts(), plan.consumers * TILE)
    total = parts[0]
    for number in range(1, parts.shape[0]):
        total = total + jnp.where(jnp.asarray(count > number), parts[number], 0)
    return total[:tokens].astype(out_dtype)


@partial(jax.jit, static_argnames=("plan", "interpreted"))
def _parts(
    x: Float[Array, "tokens in"], weight: Float[Array, "out in"], *, plan: Plan, interpreted: bool
) -> Float[Array, "parts tokens out"]:
    """The sums in float32; a part that nobody has holds anything. Compiled as a function, so that a model's layers lower it once.

    interpreted only keeps traces for the interpreter apart.
    """
    scratch = (
        hopper.swizzled((plan.stages, plan.consumers * TILE, plan.block), weight.dtype),
        hopper.swizzled((plan.stages, plan.tokens, plan.block), x.dtype),
        plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=plan.consumers, num_barriers=plan.stages),
    )
    out = jax.ShapeDtypeStruct((int(plan.parts().max()), plan.tokens, weight.shape[0]), jnp.float32)
    run = hopper.kernel(
        lambda x, weight, out, made: _body(plan, x, weight, out, Scratch(*made)),
        scratch, out_type=out, grid={"worker": plan.workers}, registers=[*[CONSUMER] * plan.consumers, PRODUCER],
    )  # fmt: skip
    return run(x, weight)


def _body(plan: Plan, x: Any, weight: Any, out: Any, scratch: Scratch) -> None:
    worker, warpgroup = lax.axis_index("worker"), lax.axis_index("wg")
    begin, end = (lax.div((worker + more) * plan.total, jnp.int32(plan.workers)) for more in range(2))

    @pl.when(warpgroup < plan.consumers)
    def _consumer() -> None:
        plgpu.set_max_registers(CONSUMER, action="increase")
        first, last = lax.div(begin, jnp.int32(plan.length)), lax.div(end - 1, jnp.int32(plan.length))
        lax.fori_loop(first, last + 1, lambda tile, _: _consume(plan, out, scratch, tile, begin, end), None)

    @pl.when(warpgroup == plan.consumers)
    def _producer() -> None:
        plgpu.set_max_registers(PRODUCER, action="decrease")
        lax.fori_loop(begin, end, lambda number, _: _produce(plan, x, weight, scratch, number, number - begin), None)
        hopper.drain(lambda slot: scratch.free.at[slot], end - begin, plan.stages)


def _produce(plan: Plan, x: Any, weight: Any, scratch: Scratch, number: Any, used: Any) -> None:
    """Copy a block of the weight and the inputs that it meets; `used` counts the blocks so far."""
    slot = lax.rem(used, jnp.int32(plan.stages))
    tile, inputs = lax.div(number, jnp.int32(plan.length)), pl.ds(lax.rem(number, jnp.int32(plan.length)) * plan.block, plan.block)
    rows = plan.consumers * TILE
    pl.when(used >= plan.stages)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
    plgpu.copy_gmem_to_smem(weight.at[pl.ds(tile * rows, rows), inputs], scratch.weight.at[slot], scratch.full.at[slot])
    plgpu.copy_gmem_to_smem(x.at[:, inputs], scratch.x.at[slot], scratch.full.at[slot])


def _consume(plan: Plan, out: Any, scratch: Scratch, tile: Any, begin: Any, end: Any) -> None:
    """Sum this worker's blocks of a tile, one warpgroup its 64 outputs, and write them as the tile's part of that number."""
    rows = pl.ds(lax.axis_index("wg") * TILE, TILE)
    first, stop = jnp.maximum(begin, tile * plan.length), jnp.minimum(end, (tile + 1) * plan.length)
    part = lax.axis_index("worker") - lax.div((tile * plan.length + 1) * plan.workers - 1, jnp.int32(plan.total))

    def free(number: Any) -> None:
        plgpu.barrier_arrive(scratch.free.at[lax.rem(number - begin, jnp.int32(plan.stages))])

    def accumulate(sums: Any) -> Any:
        def add(number: Any, _: None) -> None:
            slot = lax.rem(number - begin, jnp.int32(plan.stages))
            plgpu.barrier_wait(scratch.full.at[slot])
            plgpu.wgmma(sums, scratch.weight.at[slot].at[rows], scratch.x.at[slot].transpose((1, 0)))
            plgpu.wgmma_wait(1)
            pl.when(number > first)(lambda: free(number - 1))

        lax.fori_loop(first, stop, add, None)
        found = sums[...]
        free(stop - 1)
        return found

    sums = pl.run_scoped(accumulate, hopper.ACC((TILE, plan.tokens), jnp.float32))
    outputs = pl.ds(tile * (plan.consumers * TILE) + lax.axis_index("wg") * TILE, TILE)
    out.at[part, :, outputs].transpose((1, 0))[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
