"""One token times an int8 weight with a scale for each row, on Hopper GPUs (Pallas Mosaic GPU): the weight is never converted.

The token's limbs (`hopper_token.Limbs`) are the left side of int8 products; the weight goes from shared memory to the tensor cores as it is
stored. All of it is one kernel: each block of threads makes the limbs for itself while its first blocks of the weight are on their way, a
producer copies ahead (TMA), one consumer multiplies. Tiles are whole, so there are no parts to add up.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int8

from pallas_kernels import dispatch, hopper
from pallas_kernels.hopper import ACC, COLUMNS, TILE
from pallas_kernels.hopper_token import LIMBS, MOST_INPUTS, PAD, THREADS, Limbs, pieces_of

TOKEN = Limbs()
ROWS = (8, 16, 24, 32, 48, 64, 80, 96, 112, 128)  # of a tile: what one product of int8 can have
STAGE, STAGES = 32768, 12  # bytes of a block and blocks on their way, at most
REGISTERS = [232, 40]  # of a thread: of the consumer and of the producer


class Plan(NamedTuple):
    """Static shape: tiles of `rows` outputs dealt out to `workers`, blocks of `block` inputs, `stages` of them on their way."""

    inputs: int
    outputs: int
    rows: int
    block: int
    stages: int
    workers: int

    @property
    def tiles(self) -> int:
        """Tiles of the weight."""
        return self.outputs // self.rows

    @property
    def length(self) -> int:
        """Blocks of a tile."""
        return self.inputs // self.block


class Scratch(NamedTuple):
    """Shared memory and barriers of the stages, and the limbs; spilled: see `hopper.spill`."""

    weight: Any
    limbs: Any
    full: Any
    free: Any
    spilled: Any = None


def fits(key: dispatch.Key) -> bool:
    """Whether this is the product of a key; not for one that does not tell everything."""
    known = {"tokens": 1, "weight": "int8", "group": 0, "activations": "float"}
    if any(key.get(name) != value for name, value in known.items()) or key.get("dtype") not in ("bfloat16", "float16"):
        return False
    features, outputs = int(key["in"]), int(key["out"])
    return features % THREADS == 0 and 0 < features <= MOST_INPUTS and outputs % ROWS[0] == 0


def multiply(
    x: Float[Array, "1 in"], weight: Int8[Array, "out in"], scales: Float[Array, "out 1"], *, out_dtype: Any
) -> Float[Array, "1 out"]:
    """x @ (weight * scales).T for what `fits`."""
    plan = plan_of(*weight.shape)
    out = _product(
        x.reshape(plan.inputs), weight, scales.reshape(plan.outputs), plan=plan, out_dtype=out_dtype, interpreted=hopper.interpreting()
    )
    return out[None]


def plan_of(outputs: int, inputs: int) -> Plan:
    """How a weight is dealt out: the rows of a tile are those with which the busiest worker has least to do."""
    cores = hopper.cores()
    rows = min((rows for rows in ROWS if outputs % rows == 0), key=lambda rows: -(-outputs // rows // cores) * (rows + 4))
    block = next(block for block in (512, 256, 128) if inputs % block == 0 and block * rows <= STAGE)
    held = LIMBS * (inputs + PAD) + (TILE * block if hopper.interpreting() else 0)
    stages = min((hopper.SHARED_BYTES - 2048 - held) // (block * rows), STAGES)
    return Plan(inputs, outputs, rows, block, stages, min(cores, outputs // rows))


@partial(jax.jit, static_argnames=("plan", "out_dtype", "interpreted"))
def _product(
    x: Float[Array, "in"], weight: Int8[Array, "out in"], scales: Float[Array, "out"], *, plan: Plan, out_dtype: Any, interpreted: bool
) -> Float[Array, "out"]:
    """Compiled as a function, so that a model's layers lower it once. interpreted only keeps traces for the interpreter apart."""
    scratch = (
        hopper.swizzled((plan.stages, plan.rows, plan.block), jnp.int8),
        TOKEN.room(plan.inputs),
        plgpu.Barrier(num_barriers=plan.stages),
        plgpu.Barrier(num_barriers=plan.stages),
        *((hopper.swizzled((TILE, plan.block), jnp.int8),) if interpreted else ()),
    )

    def body(x: Any, weight: Any, scales: Any, out: Any, made: Any) -> None:
        _body(plan, x, weight, scales, out, Scratch(*made))

    out = jax.ShapeDtypeStruct((plan.outputs,), out_dtype)
    run = hopper.kernel(body, scratch, out_type=out, grid={"worker": plan.workers}, registers=REGISTERS)
    return run(x, weight, scales)


def _body(plan: Plan, x: Any, weight: Any, scales: Any, out: Any, scratch: Scratch) -> None:
    worker, warpgroup = lax.axis_index("worker"), lax.axis_index("wg")
    mine = lax.div(plan.tiles - worker + plan.workers - 1, jnp.int32(plan.workers))

    @pl.when(warpgroup == 0)
    def _consumer() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        factor = TOKEN.put(pieces_of(x), scratch.limbs)
        lax.fori_loop(0, mine, lambda number, _: _consume(plan, scales, out, scratch, number, factor), None)

    @pl.when(warpgroup == 1)
    def _producer() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        lax.fori_loop(0, mine * plan.length, lambda used, _: _produce(plan, weight, scratch, used), None)
        hopper.drain(lambda slot: scratch.free.at[slot], mine * plan.length, plan.stages)


def _produce(plan: Plan, weight: Any, scratch: Scratch, used: Any) -> None:
    """Copy a block of the weight; `used` counts the blocks so far."""
    tile = lax.axis_index("worker") + lax.div(used, jnp.int32(plan.length)) * plan.workers
    place, slot = lax.rem(used, jnp.int32(plan.length)), lax.rem(used, jnp.int32(plan.stages))
    pl.when(used >= plan.stages)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
    block = weight.at[pl.ds(tile * plan.rows, plan.rows), pl.ds(place * plan.block, plan.block)]
    plgpu.copy_gmem_to_smem(block, scratch.weight.at[slot], scratch.full.at[slot])


def _consume(plan: Plan, scales: Any, out: Any, scratch: Scratch, number: Any, factor: Any) -> None:
    """The outputs of this worker's next tile."""
    outputs = pl.ds((lax.axis_index("worker") + number * plan.workers) * plan.rows, plan.rows)

    def accumulate(accumulator: Any) -> Any:
        lax.fori_loop(0, plan.length, lambda place, _: _add_block(plan, accumulator, scratch, number * plan.length, place), None)
        return accumulator[...]

    sums = pl.run_scoped(accumulate, ACC((TILE, plan.rows), jnp.int32))
    found = TOKEN.joined(sums) * hopper.load(scales.at[outputs], COLUMNS, coalesced=False).astype(jnp.float32) * factor
    hopper.store(out.at[outputs], found.astype(out.dtype))


def _add_block(plan: Plan, accumulator: Any, scratch: Scratch, used: Any, place: Any) -> None:
    slot = lax.rem(used + place, jnp.int32(plan.stages))
    token = TOKEN.taken(scratch.limbs, place * plan.block, plan.block)
    plgpu.barrier_wait(scratch.full.at[slot])
    if scratch.spilled is not None:
        scratch.spilled[...] = token
        plgpu.commit_smem()
        token = scratch.spilled
    plgpu.wgmma(accumulator, token, scratch.weight.at[slot].transpose((1, 0)))
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(scratch.free.at[slot])
