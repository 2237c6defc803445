"""The quantised matmul of few tokens on Hopper GPUs (Pallas Mosaic GPU): the weight streams through shared memory once, as it is stored.

The weight is dealt out to blocks of threads that stay for the whole kernel (`hopper_stream`). In each, a producer copies blocks of it and
the inputs that they meet (TMA); consumers take 64 outputs each, bring them to the inputs' dtype in registers (`gpu_convert`) and multiply
(wgmma, the weight on the left so that few tokens fill the tensor cores). While one consumer converts, another's products are on their
way, and copies are several blocks ahead. Scales of whole rows multiply the sums afterwards; those of groups multiply each group's sums.

int8 and 4 bits become bfloat16 exactly. float8 becomes float16, and so do the inputs, each token brought near 1 by a power of two first.
Zeros other than 8 are a small product of their own. One token meets int8 in a kernel that converts the token in place of the weight
(`gpu_one`), and a few do in one that cuts them before (`gpu_limbs`). Many tokens are XLA's: it has the vendor's kernels for them.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt8

from pallas_kernels import dispatch, hopper, tuning
from pallas_kernels.hopper import TILE
from pallas_kernels.hopper_stream import Deal, add_up
from pallas_kernels.quantized_matmul import gpu_limbs, gpu_one, xla
from pallas_kernels.quantized_matmul.formats import PACKED, ZERO, Format
from pallas_kernels.quantized_matmul.gpu_convert import bits_of, converted, permute
from pallas_kernels.rounding import round_tokens

MOST = 64  # tokens
CONSUMER, PRODUCER = {1: 240, 2: 208, 4: 104}, 40  # registers of a thread: of a consumer, by how many there are; of the producer
BITS = {"int8": 8, "fp8": 8, "int4": 4}
STEP = 128  # inputs that are converted and multiplied at a time; 64 for groups of 64


class Sizes(NamedTuple):
    """Warpgroups that multiply, 64 outputs each, and inputs of a block; zeros leave a shape to XLA, one and zero to `gpu_one`. splits: of
    inputs, in `gpu_limbs`; zero where the weight is converted."""

    consumers: int
    block: int
    splits: int = 0


XLA, ONE = Sizes(0, 0), Sizes(1, 0)


class Plan(NamedTuple):
    """Static shape: tiles of `consumers` x 64 outputs, blocks of `block` inputs; group: inputs with a scale (0: a row has one)."""

    deal: Deal
    consumers: int
    block: int
    stages: int
    tokens: int
    group: int

    @property
    def step(self) -> int:
        """Inputs that are converted and multiplied at a time."""
        return math.gcd(STEP, self.group or STEP)


class Scratch(NamedTuple):
    """Shared memory and barriers, once per stage; spilled: see `hopper.spill`."""

    weight: Any
    x: Any
    full: Any
    free: Any
    spilled: Any = None


def refusal(target: dispatch.Target, key: dispatch.Key) -> str | None:
    """Why this cannot run on a target, or for what is known of a key; None when it can."""
    reason = hopper.refusal(target, {"dtype": key.get("dtype", "bfloat16")})
    if reason is not None or gpu_one.fits(key) or gpu_limbs.fits(key):
        return reason
    if key.get("dtype", "bfloat16") != "bfloat16":
        return f"its kernel takes inputs in bfloat16, not in {key['dtype']}"
    features, outputs, group = int(key.get("in", 128)), int(key.get("out", TILE)), int(key.get("group", 0))
    if features % 128 or outputs % TILE:
        return f"its kernel needs inputs in multiples of 128 and outputs in multiples of {TILE}, not {features} and {outputs}"
    if group % TILE:
        return f"its kernel needs groups in multiples of {TILE} inputs, not {group}"
    return None


def heuristic(platform: str, key: dict[str, int | str]) -> dict[str, int]:
    """Sizes that were never measured."""
    return candidates(platform, key)[0]


def candidates(platform: str, key: dict[str, int | str]) -> list[dict[str, int]]:
    """Sizes worth measuring."""
    return [sizes._asdict() for sizes in (*_fitting(key), XLA)]


def _fitting(key: dict[str, int | str]) -> list[Sizes]:
    """Sizes that divide the shape and leave room for three stages, best guess first; none for no tokens and for many."""
    tokens, found = _padded(int(key["tokens"])), [ONE] if gpu_one.fits(key) else []
    if not 0 < tokens <= MOST or key["dtype"] != "bfloat16":
        return found
    if gpu_limbs.fits(key):
        found += [Sizes(plan.consumers, plan.block, plan.splits) for plan in gpu_limbs.candidates(key)]
    for consumers in (2, 4, 1):
        for block in (256, 512, 128):
            stage = block * (consumers * TILE * BITS[str(key["weight"])] // 8 + 2 * tokens)
            group = int(key["group"])
            whole = int(key["out"]) % (consumers * TILE) == 0 and int(key["in"]) % block == 0 and (not group or block % group == 0)
            if whole and 3 * stage <= hopper.SHARED_BYTES - 2048:
                found.append(Sizes(consumers, block))
    return found


def _padded(tokens: int) -> int:
    return tokens + -tokens % 8


def quantized_matmul(
    x: Float[Array, "tokens in"],
    weight: Shaped[Array, "out stored"],
    scales: Float[Array, "outs ins"],
    *,
    zeros: UInt8[Array, "outs ins"] | None = None,
    activations: str = "float",
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "tokens out"]:
    """See api.quantized_matmul."""
    kind, outputs = Format.of(weight, scales, activations), weight.shape[0]
    sizes = Sizes(**tuning.sizes("quantized_matmul", "gpu", dispatch.target(), kind.key(x, weight)))
    if sizes == XLA:
        with tuning.forced(xla.heuristic("gpu", kind.key(x, weight))):
            return xla.quantized_matmul(x, weight, scales, zeros=zeros, activations=activations, out_dtype=out_dtype)
    per_row = jnp.repeat(scales, outputs // scales.shape[0], axis=0)
    final = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    if sizes == ONE:
        return gpu_one.multiply(x, weight, per_row, out_dtype=final)
    if sizes.splits:
        plan = gpu_limbs.plan_of(x.shape[0], x.shape[1], outputs, sizes.block, sizes.splits)
        return gpu_limbs.multiply(x, weight, per_row, plan=plan, out_dtype=final)
    inputs, per_token = _inputs(x, kind)
    plan = plan_of(sizes, inputs.shape[0], outputs, x.shape[1], kind)
    parts = _parts(inputs, weight, per_row if kind.inputs else None, plan=plan, interpreted=hopper.interpreting())
    sums = add_up(parts[:, : x.shape[0]], plan.deal)  # padding goes first: cut off last, XLA computes it
    if not kind.inputs:
        sums = sums * per_row.astype(jnp.float32).T
    if zeros is not None:
        sums = sums - _shift(inputs[: x.shape[0]], per_row, jnp.repeat(zeros, outputs // zeros.shape[0], axis=0))
    if per_token is not None:
        sums = sums * per_token[: x.shape[0]]
    return sums.astype(final)


def plan_of(sizes: Sizes, tokens: int, outputs: int, features: int, kind: Format) -> Plan:
    """How a weight is dealt out for so many tokens (a multiple of 8)."""
    stage = sizes.block * (sizes.consumers * TILE * BITS[kind.weight] // 8 + 2 * tokens)
    spill = sizes.consumers * TILE * STEP * 2 if hopper.interpreting() else 0
    tiles, length = outputs // (sizes.consumers * TILE), features // sizes.block
    deal = Deal(tiles, length, min(hopper.cores(), tiles * length))
    stages = min((hopper.SHARED_BYTES - 2048 - spill) // stage, -(-deal.total // deal.workers) + 1, hopper.BARRIERS)
    return Plan(deal, sizes.consumers, sizes.block, stages, tokens, kind.inputs)


def _inputs(x: Float[Array, "tokens in"], kind: Format) -> tuple[Float[Array, "padded in"], Float[Array, "padded 1"] | None]:
    """What the kernel multiplies with, tokens filled up to a multiple of 8, and a factor for each token's sums."""
    padded, dtype, factors = jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0))), x.dtype, None
    if kind.activations == "int8":
        values, factors = round_tokens(padded)
        padded = values.astype(dtype)
    if kind.weight == "fp8":
        wide = padded.astype(jnp.float32)
        top = jnp.max(jnp.abs(wide), axis=1, keepdims=True)
        exponent = lax.bitcast_convert_type(jnp.clip(top, 1e-30, 1e30), jnp.int32) & 0x7F800000
        power = lax.bitcast_convert_type(exponent, jnp.float32)
        padded, factors = (wide / power).astype(jnp.float16), power if factors is None else factors * power
    return padded, factors


def _shift(
    x: Float[Array, "tokens in"], scales: Float[Array, "out ins"], zeros: UInt8[Array, "out ins"]
) -> Float[Array, "tokens out"]:
    """What zeros other than 8 take off: each group's inputs summed, times (zero - 8) * scale."""
    groups = x.astype(jnp.float32).reshape(x.shape[0], scales.shape[1], -1).sum(axis=2)
    return jnp.matmul(groups, ((zeros.astype(jnp.float32) - ZERO) * scales.astype(jnp.float32)).T, precision="highest")


@partial(jax.jit, static_argnames=("plan", "interpreted"))
def _parts(
    x: Float[Array, "tokens in"],
    weight: Shaped[Array, "out stored"],
    scales: Float[Array, "out ins"] | None,
    *,
    plan: Plan,
    interpreted: bool,
) -> Float[Array, "parts tokens out"]:
    """The sums in float32; a part that nobody has holds anything. Compiled as a function, so that a model's layers lower it once.

    interpreted only keeps traces for the interpreter apart.
    """
    outputs = weight.shape[0]
    if weight.dtype == PACKED:
        weight = lax.bitcast_convert_type(weight, jnp.int4).reshape(outputs, -1)
    x = permute(x, bits_of(weight.dtype))
    scratch = (
        _swizzled((plan.stages, plan.consumers * TILE, plan.block), weight.dtype, plan.step),
        hopper.swizzled((plan.stages, plan.tokens, plan.block), x.dtype),
        plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=plan.consumers, num_barriers=plan.stages),
        *((hopper.swizzled((plan.consumers, TILE, plan.step), x.dtype),) if interpreted else ()),
    )
    out = jax.ShapeDtypeStruct((int(plan.deal.parts().max()), plan.tokens, outputs), jnp.float32)
    given = (x, weight) if scales is None else (x, weight, scales)

    def body(*refs: Any) -> None:
        *arrays, out, made = refs
        _body(plan, arrays[0], arrays[1], arrays[2] if len(arrays) > 2 else None, out, Scratch(*made))

    registers = [*[CONSUMER[plan.consumers]] * plan.consumers, PRODUCER]
    run = hopper.kernel(body, scratch, out_type=out, grid={"worker": plan.deal.workers}, registers=registers)
    return run(*given)


def _swizzled(shape: tuple[int, ...], dtype: Any, step: int) -> Any:
    """Shared memory for weights, of which `step` inputs are read at a time."""
    bits = bits_of(dtype)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, step)), plgpu.SwizzleTransform(step * bits // 8)))


def _body(plan: Plan, x: Any, weight: Any, scales: Any, out: Any, scratch: Scratch) -> None:
    worker, warpgroup, deal = lax.axis_index("worker"), lax.axis_index("wg"), plan.deal
    begin, end = deal.begin(worker), deal.begin(worker + 1)

    @pl.when(warpgroup < plan.consumers)
    def _consumer() -> None:
        plgpu.set_max_registers(CONSUMER[plan.consumers], action="increase")
        first, last = deal.tile(begin), deal.tile(end - 1)
        lax.fori_loop(first, last + 1, lambda tile, _: _consume(plan, scales, out, scratch, tile, begin, end), None)

    @pl.when(warpgroup == plan.consumers)
    def _producer() -> None:
        plgpu.set_max_registers(PRODUCER, action="decrease")
        lax.fori_loop(begin, end, lambda number, _: _produce(plan, x, weight, scratch, number, number - begin), None)
        hopper.drain(lambda slot: scratch.free.at[slot], end - begin, plan.stages)


def _produce(plan: Plan, x: Any, weight: Any, scratch: Scratch, number: Any, used: Any) -> None:
    """Copy a block of the weight and the inputs that it meets; `used` counts the blocks so far."""
    slot, rows = lax.rem(used, jnp.int32(plan.stages)), plan.consumers * TILE
    inputs = pl.ds(plan.deal.place(number) * plan.block, plan.block)
    pl.when(used >= plan.stages)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
    plgpu.copy_gmem_to_smem(weight.at[pl.ds(plan.deal.tile(number) * rows, rows), inputs], scratch.weight.at[slot], scratch.full.at[slot])
    plgpu.copy_gmem_to_smem(x.at[:, inputs], scratch.x.at[slot], scratch.full.at[slot])


def _consume(plan: Plan, scales: Any, out: Any, scratch: Scratch, tile: Any, begin: Any, end: Any) -> None:
    """Sum this worker's blocks of a tile, one warpgroup its 64 outputs, and write them as the tile's part of that number."""
    deal, warpgroup = plan.deal, lax.axis_index("wg")
    first, stop = jnp.maximum(begin, tile * deal.length), jnp.minimum(end, (tile + 1) * deal.length)
    outputs = pl.ds((tile * plan.consumers + warpgroup) * TILE, TILE)

    def slot_of(number: Any) -> Any:
        return lax.rem(number - begin, jnp.int32(plan.stages))

    if plan.group:
        zero = plgpu.layout_cast(jnp.full((TILE, plan.tokens), 0, jnp.float32), hopper.WHOLE)
        sums = lax.fori_loop(
            first, stop, lambda number, sums: _add_groups(plan, scales, outputs, scratch, slot_of(number), deal.place(number), sums), zero
        )
    else:

        def accumulate(accumulator: Any) -> Any:
            lax.fori_loop(first, stop, lambda number, _: _add_block(plan, accumulator, scratch, slot_of(number)), None)
            return accumulator[...]

        sums = pl.run_scoped(accumulate, hopper.ACC((TILE, plan.tokens), jnp.float32))
    part = deal.part(lax.axis_index("worker"), tile)
    out.at[part, :, outputs].transpose((1, 0))[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)


def _add_block(plan: Plan, accumulator: Any, scratch: Scratch, slot: Any) -> None:
    plgpu.barrier_wait(scratch.full.at[slot])
    for step in range(0, plan.block, plan.step):
        _multiply(accumulator, scratch, slot, pl.ds(step, plan.step))
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(scratch.free.at[slot])


def _add_groups(plan: Plan, scales: Any, outputs: Any, scratch: Scratch, slot: Any, place: Any, sums: Any) -> Any:
    """A block's groups, each summed by itself and then scaled."""
    groups = plan.block // plan.group
    factors = [hopper.load(scales.at[outputs, place * groups + index], hopper.ROWS, coalesced=False) for index in range(groups)]
    plgpu.barrier_wait(scratch.full.at[slot])
    for index, factor in enumerate(factors):

        def accumulate(accumulator: Any, index: int = index) -> Any:
            for step in range(index * plan.group, (index + 1) * plan.group, plan.step):
                _multiply(accumulator, scratch, slot, pl.ds(step, plan.step))
            return accumulator[...]

        found = pl.run_scoped(accumulate, hopper.ACC((TILE, plan.tokens), jnp.float32))
        sums = sums + found * hopper.spread(factor.astype(jnp.float32), found.shape)
    plgpu.barrier_arrive(scratch.free.at[slot])
    return sums


def _multiply(accumulator: Any, scratch: Scratch, slot: Any, inputs: Any) -> None:
    """Start the products of some inputs of a block; what was started before may still be running."""
    warpgroup = lax.axis_index("wg")
    stored = scratch.weight.at[slot].at[pl.ds(warpgroup * TILE, TILE), inputs]
    values = converted(stored, scratch.x.dtype)
    x = scratch.x.at[slot].at[:, inputs].transpose((1, 0))
    if scratch.spilled is not None:
        scratch.spilled.at[warpgroup][...] = values
        plgpu.commit_smem()
        plgpu.wgmma(accumulator, scratch.spilled.at[warpgroup], x)
        plgpu.wgmma_wait(0)
        return
    plgpu.wgmma(accumulator, values, x)
    plgpu.wgmma_wait(1)
