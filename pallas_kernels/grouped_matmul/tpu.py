"""The grouped matmul on TPU (Pallas Mosaic TPU): only weights of groups that have rows stream through VMEM.

XLA lays each group's rows out in blocks of their own (the last one padded), so that a block meets one weight; which one, and how many
blocks there are, the kernel reads from SMEM, as MegaBlocks (Gale et al., arXiv 2211.15841) does with its sparse topology. The inputs of
a block stay in VMEM while tiles of its weight, whole rows of some output channels, come into one of two buffers; steps of inputs are
multiplied, converted first where the weight is of 8 bits, and scales multiply the sums in the end. A block of decode reads each
weight that is needed once; a group of several blocks reads its weight for each. Compiled and simulated, not yet measured on a chip.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels import dispatch, generations, tensorcore, tuning
from pallas_kernels.attention import precision
from pallas_kernels.grouped_matmul.api import OP, key
from pallas_kernels.tensorcore import LANES, Call, Copies

ROWS = 32  # of a tile of 8 bits
MOST_ROWS = 512
X_BYTES, WEIGHT_BYTES = 8 << 20, 2 << 20  # VMEM for a block of inputs, and for a tile of a weight


class Sizes(NamedTuple):
    """Rows of a block and output channels of a tile; inputs multiplied at a time."""

    rows: int
    outputs: int
    step: int


class Plan(NamedTuple):
    """Static shape: at most `blocks` of `sizes.rows`, `tiles` of `sizes.outputs`."""

    sizes: Sizes
    blocks: int
    tiles: int
    cores: int


class Layout(NamedTuple):
    """Where rows lie: the group of each block, how many blocks there are, the row that each place holds, the place of each row."""

    groups: Int32[Array, "blocks"]
    used: Int32[Array, "one"]
    rows: Int32[Array, "places"]
    places: Int32[Array, "rows"]


class Arrays(NamedTuple):
    """In HBM: blocks of inputs, the weights, the scale of each output channel or None."""

    x: Any  # [places, in]
    weight: Any  # [groups, out, in]
    scales: Any  # [groups, 1, out]


class Scratch(NamedTuple):
    """VMEM: inputs of a block; two tiles and their scales; sums; two results; semaphores."""

    x: Any
    weight: Any
    scales: Any
    sums: Any
    out: Any
    x_done: Any
    weight_done: Any
    out_done: Any


class Kernel(NamedTuple):
    """What the parts of the kernel see."""

    plan: Plan
    copies: Copies
    groups: Any
    used: Any
    arrays: Arrays
    out: Any
    scratch: Scratch


def heuristic(platform: str, key: dispatch.Key) -> dict[str, int]:
    """Sizes for a key that was never measured: blocks of as many rows as a group has on average, tiles of about 2 MiB."""
    features, outputs = int(key["in"]), int(key["out"])
    wide, stored = (features * jnp.dtype(str(key[name])).itemsize for name in ("dtype", "weight"))
    mean, rows = -(-int(key["rows"]) // int(key["groups"])), ROWS
    while rows < min(mean, MOST_ROWS) and 2 * rows * wide <= X_BYTES:
        rows *= 2
    tile = tensorcore.tile_of(outputs, stored, WEIGHT_BYTES)
    return Sizes(rows, tile, next(size for size in (512, 384, 256, LANES) if features % size == 0))._asdict()


def candidates(platform: str, key: dispatch.Key) -> list[dict[str, int]]:
    """Sizes worth measuring."""
    base = Sizes(**heuristic(platform, key))
    outputs = [size for size in (base.outputs // 2, base.outputs * 2) if size and size % LANES == 0 and size <= int(key["out"])]
    rows = [size for size in (base.rows // 2, base.rows * 2) if ROWS <= size <= MOST_ROWS]
    return [sizes._asdict() for sizes in (base, *(base._replace(outputs=o) for o in outputs), *(base._replace(rows=r) for r in rows))]


def refusal(target: dispatch.Target, key: dispatch.Key) -> str | None:
    """Why this cannot run on a target, or for what is known of a key; None when it can."""
    reason = tensorcore.refusal(target, key)
    if reason is None and "in" in key and (int(key["in"]) % LANES or int(key["out"]) % ROWS):
        return f"its kernel needs inputs in multiples of {LANES} and outputs of {ROWS}, not {key['in']} and {key['out']}"
    return reason


def grouped_matmul(
    x: Float[Array, "rows in"],
    weight: Shaped[Array, "groups out in"],
    sizes: Int32[Array, "groups"],
    *,
    scales: Float[Array, "groups out"] | None = None,
    out_dtype: DTypeLike,
) -> Float[Array, "rows out"]:
    """See api.grouped_matmul."""
    rows, (groups, outputs, _) = x.shape[0], weight.shape
    if not rows:
        return jnp.zeros((0, outputs), out_dtype)
    target = dispatch.target()
    own = Sizes(**tuning.sizes(OP, "tpu", target, key(x, weight)))
    chip = tensorcore.generation(target.device) or generations.V5E
    plan = Plan(own, min(rows // own.rows + groups, rows), -(-outputs // own.outputs), chip.cores)
    layout = lay_out(sizes, rows, plan)
    per_output = None
    if scales is not None:
        per_output = jnp.pad(scales.astype(jnp.float32), ((0, 0), (0, plan.tiles * own.outputs - outputs)))[:, None]
    found = _run(Arrays(x[layout.rows], weight, per_output), layout, jnp.dtype(out_dtype), plan)
    real = jnp.arange(rows, dtype=jnp.int32)[:, None] < jnp.sum(sizes)
    return jnp.where(real, found[layout.places, :outputs], 0)


def lay_out(sizes: Int32[Array, "groups"], rows: int, plan: Plan) -> Layout:
    """Blocks for each group, one group after the other; places that hold no row hold some other one, which nobody reads."""
    block = plan.sizes.rows
    ends, until = jnp.cumsum(sizes), jnp.cumsum(-(-sizes // block))
    last = jnp.int32(sizes.shape[0] - 1)

    def group_of(numbers: Int32[Array, "n"], ends: Int32[Array, "groups"]) -> Int32[Array, "n"]:
        return jnp.minimum(jnp.sum(numbers[:, None] >= ends[None], axis=1, dtype=jnp.int32), last)

    blocks, row = (jnp.arange(size, dtype=jnp.int32) for size in (plan.blocks, rows))
    groups, own = group_of(blocks, until), group_of(row, ends)
    before, start = until + sizes // -block, ends - sizes  # blocks and rows of the groups before
    held = (start[groups] + (blocks - before[groups]) * block)[:, None] + jnp.arange(block, dtype=jnp.int32)[None]
    places = before[own] * block + row - start[own]
    return Layout(groups, until[-1:], jnp.clip(held.reshape(-1), 0, rows - 1), jnp.clip(places, 0, plan.blocks * block - 1))


def _run(arrays: Arrays, layout: Layout, dtype: Any, plan: Plan) -> Float[Array, "places padded_out"]:
    given, tree = jax.tree.flatten(arrays)
    sizes, features, vmem = plan.sizes, arrays.weight.shape[2], pltpu.VMEM
    scratch = Scratch(
        x=vmem((sizes.rows, features), arrays.x.dtype),
        weight=vmem((2, sizes.outputs, features), arrays.weight.dtype),
        scales=None if arrays.scales is None else vmem((2, 1, sizes.outputs), jnp.float32),
        sums=vmem((sizes.rows, sizes.outputs), jnp.float32),
        out=vmem((2, sizes.rows, sizes.outputs), dtype),
        x_done=pltpu.SemaphoreType.DMA(()),
        weight_done=pltpu.SemaphoreType.DMA((2,)),
        out_done=pltpu.SemaphoreType.DMA((2,)),
    )
    leaves, made = jax.tree.flatten(scratch)

    def body(copies: Copies, scalars: Any, hbm: Any, _: Any, outputs: Any, own: Any) -> None:
        _core(Kernel(plan, copies, scalars[0], scalars[1], jax.tree.unflatten(tree, hbm), outputs[0], jax.tree.unflatten(made, own)))

    shape = (plan.blocks * sizes.rows, plan.tiles * sizes.outputs)
    one = arrays.weight.nbytes // arrays.weight.shape[0]
    moved = arrays.x.nbytes + plan.blocks * one + shape[0] * shape[1] * dtype.itemsize
    cost = pl.CostEstimate(flops=2 * shape[1] * arrays.x.size, transcendentals=0, bytes_accessed=moved)
    call = Call(OP, [jax.ShapeDtypeStruct(shape, dtype)], leaves, {}, cost, plan.cores, 44 << 20)
    return tensorcore.run(call, body, (layout.groups, layout.used), given)[0]


def _core(kernel: Kernel) -> None:
    """All tiles of one core, block of rows after block of rows."""
    plan, core = kernel.plan, pl.program_id(0)
    begin, end = (lax.div((core + more) * plan.tiles, jnp.int32(plan.cores)) for more in range(2))
    count = jnp.maximum(end - begin, 1)
    total = (end - begin) * kernel.used[0]

    def weight(number: Any, slot: Any, *, start: bool) -> None:
        _copy_weight(kernel, kernel.groups[lax.div(number, count)], begin + lax.rem(number, count), slot, start=start)

    pl.when(total > 0)(lambda: weight(jnp.int32(0), 0, start=True))

    def step(number: Any, _: None) -> None:
        block, tile, slot = lax.div(number, count), begin + lax.rem(number, count), lax.rem(number, jnp.int32(2))

        @pl.when(tile == begin)
        def _inputs() -> None:
            _copy_inputs(kernel, block, start=True)
            _copy_inputs(kernel, block, start=False)

        pl.when(number + 1 < total)(lambda: weight(number + 1, 1 - slot, start=True))
        weight(number, slot, start=False)
        _multiply(kernel, slot)
        pl.when(number >= 2)(lambda: _copy_out(kernel, block, tile, slot, start=False))
        found = kernel.scratch.sums[...]
        if kernel.scratch.scales is not None:
            found = found * kernel.scratch.scales[slot]
        kernel.scratch.out[slot] = found.astype(kernel.scratch.out.dtype)
        _copy_out(kernel, block, tile, slot, start=True)

    lax.fori_loop(0, total, step, None)
    for slot in range(2):
        pl.when(total > slot)(lambda slot=slot: _copy_out(kernel, 0, begin, slot, start=False))


def _copy_inputs(kernel: Kernel, block: Any, *, start: bool) -> None:
    act, rows = kernel.copies.start if start else kernel.copies.wait, kernel.plan.sizes.rows
    act(kernel.arrays.x.at[pl.ds(pl.multiple_of(block * rows, rows), rows), :], kernel.scratch.x, kernel.scratch.x_done)


def _copy_weight(kernel: Kernel, group: Any, tile: Any, slot: Any, *, start: bool) -> None:
    act, scratch, outputs = kernel.copies.start if start else kernel.copies.wait, kernel.scratch, kernel.plan.sizes.outputs
    first = pl.multiple_of(tile * outputs, outputs)

    def rows(count: int) -> None:
        act(kernel.arrays.weight.at[group, pl.ds(first, count), :], scratch.weight.at[slot, :count], scratch.weight_done.at[slot])

    tensorcore.copy_tile(tile, outputs, kernel.arrays.weight.shape[1], rows)
    if kernel.arrays.scales is not None:
        act(kernel.arrays.scales.at[group, :, pl.ds(first, outputs)], scratch.scales.at[slot], scratch.weight_done.at[slot])


def _copy_out(kernel: Kernel, block: Any, tile: Any, slot: Any, *, start: bool) -> None:
    act, sizes = kernel.copies.start if start else kernel.copies.wait, kernel.plan.sizes
    rows, columns = (pl.ds(pl.multiple_of(x * size, size), size) for x, size in ((block, sizes.rows), (tile, sizes.outputs)))
    act(kernel.scratch.out.at[slot], kernel.out.at[rows, columns], kernel.scratch.out_done.at[slot])


def _multiply(kernel: Kernel, slot: Any) -> None:
    """Sums of a tile, step after step."""
    scratch, sizes = kernel.scratch, kernel.plan.sizes
    rows = min(sizes.rows, 256)
    scratch.sums[...] = jnp.zeros(scratch.sums.shape, scratch.sums.dtype)

    def add(number: Any, _: None) -> None:
        place = pl.ds(pl.multiple_of(number * sizes.step, sizes.step), sizes.step)
        values = scratch.weight[slot, :, place].astype(scratch.x.dtype)

        def some(block: Any, _: None) -> None:
            own = pl.ds(pl.multiple_of(block * rows, rows), rows)
            x = scratch.x[own, place]
            numbers = (((1,), (1,)), ((), ()))
            dots = lax.dot_general(x, values, numbers, precision=precision(x.dtype), preferred_element_type=jnp.float32)
            scratch.sums[own, :] = scratch.sums[own, :] + dots

        lax.fori_loop(0, sizes.rows // rows, some, None)

    lax.fori_loop(0, scratch.x.shape[1] // sizes.step, add, None)
