"""A few tokens (2 to 64) times an int8 weight with a scale for each row, on Hopper GPUs: nothing converts the weight.

Each token is cut into two int8 numbers for every input, its limbs, once, by a kernel before this one (`gpu_cut`). The weight goes from
shared memory to the tensor cores as it is stored, 64 rows at the left of a product; limbs are the columns at its right. Sums are integers,
exact over all inputs, and become floats once.

Rows of the weight are dealt out to groups of blocks of threads, eight by eight, so that all have as many; a warpgroup multiplies 64 of
them, the last one what is left. Inputs are dealt out to `splits` of them, whose sums XLA adds; where there is one, results are written as
they are to be. Limbs go to every group, out of the L2.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8

from pallas_kernels import dispatch, hopper, hopper_limbs
from pallas_kernels.hopper import TILE
from pallas_kernels.hopper_limbs import LIMBS
from pallas_kernels.quantized_matmul.gpu_cut import cut

MOST, MOST_INPUTS = 64, 131072 - 128  # tokens; inputs: sums of limbs stay below 2^31
CONSUMER, PRODUCER = {1: 240, 2: 208, 3: 152, 4: 104}, 40  # registers of a thread: of a consumer, by their number; producer
UNIT = 8  # rows that are dealt out together, as shared memory keeps them
BLOCKS, SPLITS = (256, 128), range(1, 9)
MOST_STAGES, LEAST_STAGES = 12, 3
CANDIDATES = 6
LIMB, COLUMN = 1 / 16, 0.3  # what a byte of limbs, and a warpgroup's column of products for an input, take where a byte of weights takes 1


class Plan(NamedTuple):
    """Static shape. tokens: a multiple of 8; block: inputs of a slot; splits: of inputs; groups: of `rows` rows each, where the last one
    may have rows that another has as well."""

    tokens: int
    inputs: int
    outputs: int
    block: int
    splits: int
    groups: int
    rows: int

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return -(-self.rows // TILE)

    @property
    def times(self) -> int:
        """Blocks of threads that a multiprocessor has, one after the other."""
        return -(-self.groups * self.splits // hopper.cores())

    @property
    def stages(self) -> int:
        """Slots of weights and limbs that there is room for."""
        room = hopper.SHARED_BYTES - 2048 - self.rest * self.block
        return min(room // (self.block * (self.rows + LIMBS * self.tokens)), MOST_STAGES)

    @property
    def rest(self) -> int:
        """Rows that the last warpgroup multiplies though they are others: the next slot's, or none."""
        return self.consumers * TILE - self.rows

    @property
    def behind(self) -> int:
        """Slots whose products may still be on their way when those of the next one begin: a single warpgroup would leave gaps."""
        return 1 if self.consumers == 1 else 0

    @property
    def cost(self) -> float:
        """What a multiprocessor takes, as bytes of weights: these and limbs, or products if they take longer; and sums, written and read if
        there are splits."""
        inputs, columns = -(-self.inputs // self.block // self.splits) * self.block, LIMBS * self.tokens
        sums = (2 * 4 if self.splits > 1 else 2) * self.rows * self.tokens
        return self.times * (inputs * max(self.rows + LIMB * columns, COLUMN * columns * self.consumers) + sums)

    def first(self, group: Any) -> Any:
        """The first row of a group."""
        return jnp.minimum(group * self.rows, self.outputs - self.rows)

    def begin(self, split: Any) -> Any:
        """The first block of inputs of a split; that of split + 1 ends it."""
        return lax.div(split * (self.inputs // self.block), jnp.int32(self.splits))


class Refs(NamedTuple):
    """Memory: limbs and sizes of tokens, the weight and its scales, and what is written."""

    limbs: Any
    sizes: Any
    weight: Any
    scales: Any
    out: Any


class Scratch(NamedTuple):
    """Shared memory and barriers, once per stage; weights of all stages below one another."""

    weight: Any
    limbs: Any
    full: Any
    free: Any


def fits(key: dispatch.Key) -> bool:
    """Whether this is a product of a key; not for one that does not tell everything."""
    known = {"dtype": "bfloat16", "weight": "int8", "group": 0, "activations": "float"}
    if any(key.get(name) != value for name, value in known.items()) or not {"tokens", "in", "out"} <= set(key):
        return False
    tokens, inputs, outputs = (int(key[name]) for name in ("tokens", "in", "out"))
    return 1 < tokens <= MOST and 0 < inputs <= MOST_INPUTS and inputs % min(BLOCKS) == 0 and outputs > 0 and outputs % UNIT == 0


def candidates(key: dispatch.Key) -> list[Plan]:
    """Ways to deal out what `fits`, best guess first: that which costs least."""
    tokens, inputs, outputs = (int(key[name]) for name in ("tokens", "in", "out"))
    found = [
        plan_of(tokens, inputs, outputs, block, splits)
        for block in BLOCKS
        for splits in SPLITS
        if inputs % block == 0 and splits <= min(inputs // block, hopper.cores())
    ]
    fitting = [plan for plan in found if plan.stages >= LEAST_STAGES and (plan.splits == 1 or plan.times == 1)]
    return sorted(fitting, key=lambda plan: plan.cost)[:CANDIDATES]


def plan_of(tokens: int, inputs: int, outputs: int, block: int, splits: int) -> Plan:
    """How a weight is dealt out, to all multiprocessors once, or several times where there are too many rows."""
    units, there = outputs // UNIT, hopper.cores() // splits
    times = -(-outputs // (there * max(CONSUMER) * TILE))
    rows = -(-units // (there * times))
    return Plan(tokens + -tokens % 8, inputs, outputs, block, splits, -(-units // rows), rows * UNIT)


def multiply(
    x: Float[Array, "tokens in"], weight: Int8[Array, "out in"], scales: Float[Array, "out 1"], *, plan: Plan, out_dtype: jnp.dtype
) -> Float[Array, "tokens out"]:
    """x @ (weight * scales).T for what `fits`."""
    limbs, sizes = cut(x)
    per_row = scales.astype(jnp.float32).reshape(-1)
    dtype = out_dtype if plan.splits == 1 else jnp.dtype(jnp.float32)
    parts = _parts(limbs, sizes, weight, per_row, plan=plan, dtype=dtype, interpreted=hopper.interpreting())[:, : x.shape[0]]
    sums = parts[0]
    for number in range(1, plan.splits):
        sums = sums + parts[number]
    return sums.astype(out_dtype)


@partial(jax.jit, static_argnames=("plan", "dtype", "interpreted"))
def _parts(
    limbs: Int8[Array, "limbs in"],
    sizes: Float32[Array, "tokens"],
    weight: Int8[Array, "out in"],
    scales: Float32[Array, "out"],
    *,
    plan: Plan,
    dtype: jnp.dtype,
    interpreted: bool,
) -> Float[Array, "splits tokens out"]:
    """The results of each split. Compiled as a function, so that a model's layers lower it once.

    interpreted only keeps traces for the interpreter apart.
    """
    scratch = (
        hopper.swizzled((plan.stages * plan.rows + plan.rest, plan.block), jnp.int8),
        hopper.swizzled((plan.stages, LIMBS * plan.tokens, plan.block), jnp.int8),
        plgpu.Barrier(num_arrivals=2, num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=plan.consumers, num_barriers=plan.stages),
    )
    out = jax.ShapeDtypeStruct((plan.splits, plan.tokens, plan.outputs), dtype)

    def body(*refs: Any) -> None:
        *arrays, made = refs
        _body(plan, Refs(*arrays), Scratch(*made))

    registers = [*[CONSUMER[plan.consumers]] * plan.consumers, PRODUCER]
    run = hopper.kernel(body, scratch, out_type=out, grid={"worker": plan.groups * plan.splits}, registers=registers)
    return run(limbs, sizes, weight, scales)


def _body(plan: Plan, refs: Refs, scratch: Scratch) -> None:
    worker, warpgroup = lax.axis_index("worker"), lax.axis_index("wg")
    row, split = plan.first(lax.rem(worker, jnp.int32(plan.groups))), lax.div(worker, jnp.int32(plan.groups))
    begin = plan.begin(split)
    blocks = plan.begin(split + 1) - begin

    @pl.when(warpgroup < plan.consumers)
    def _consumer() -> None:
        plgpu.set_max_registers(CONSUMER[plan.consumers], action="increase")
        whole, rest = divmod(plan.rows, TILE)
        if whole:
            pl.when(warpgroup < whole)(lambda: _consume(plan, refs, scratch, blocks, split, pl.ds(row + warpgroup * TILE, TILE)))
        if rest:
            pl.when(warpgroup == whole)(lambda: _consume(plan, refs, scratch, blocks, split, pl.ds(row + whole * TILE, rest)))

    @pl.when(warpgroup == plan.consumers)
    def _producer() -> None:
        plgpu.set_max_registers(PRODUCER, action="decrease")
        lax.fori_loop(0, blocks, lambda used, _: _produce(plan, refs, scratch, pl.ds(row, plan.rows), begin, used), None)
        hopper.drain(lambda slot: scratch.free.at[slot], blocks, plan.stages)


def _produce(plan: Plan, refs: Refs, scratch: Scratch, rows: Any, begin: Any, used: Any) -> None:
    """Copy a block of a group's rows and the limbs that it meets; `used` counts the blocks so far."""
    slot = lax.rem(used, jnp.int32(plan.stages))
    inputs, full = pl.ds((begin + used) * plan.block, plan.block), scratch.full.at[slot]
    pl.when(used >= plan.stages)(lambda: plgpu.barrier_wait(scratch.free.at[slot]))
    plgpu.copy_gmem_to_smem(refs.weight.at[rows, inputs], scratch.weight.at[pl.ds(slot * plan.rows, plan.rows)], full)
    plgpu.copy_gmem_to_smem(refs.limbs.at[:, inputs], scratch.limbs.at[slot], full)


def _consume(plan: Plan, refs: Refs, scratch: Scratch, blocks: Any, split: Any, rows: Any) -> None:
    """Sum up to 64 rows over a split's inputs, and write what comes of them; the products of rows that are not there mean nothing."""
    own = lax.axis_index("wg") * TILE

    def free(used: Any) -> None:
        plgpu.barrier_arrive(scratch.free.at[lax.rem(used, jnp.int32(plan.stages))])

    def accumulate(accumulator: Any) -> Any:
        def step(used: Any, _: None) -> None:
            slot = lax.rem(used, jnp.int32(plan.stages))
            plgpu.barrier_wait(scratch.full.at[slot])
            mine = scratch.weight.at[pl.ds(slot * plan.rows + own, TILE)]
            plgpu.wgmma(accumulator, mine, scratch.limbs.at[slot].transpose((1, 0)))
            plgpu.wgmma_wait(plan.behind)
            pl.when(used >= plan.behind)(lambda: free(used - plan.behind))

        lax.fori_loop(0, blocks, step, None)
        plgpu.wgmma_wait(0)
        for number in range(plan.behind):
            free(blocks - plan.behind + number)
        return accumulator[...]

    products = pl.run_scoped(accumulate, hopper.ACC((TILE, LIMBS * plan.tokens), jnp.int32))
    results = hopper_limbs.scaled(hopper_limbs.joined(products), refs.sizes, refs.scales.at[rows])
    hopper_limbs.leave(refs.out.at[split, :, rows], results.astype(refs.out.dtype), plan.outputs)
