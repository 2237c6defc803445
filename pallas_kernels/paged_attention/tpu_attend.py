"""The kernel of paged attention on TPU: items (a block of queries, a row) one after the other, their keys and values copied ahead.

One design for decode rows, chunks of prompts and both at once, after Ragged Paged Attention (arXiv 2604.15464): queries of a block stand
in VMEM, as one matrix per kv head; the row's pages come in blocks of keys into one of two buffers while the other is in use, across
items too; the online softmax stays in VMEM until the block's last item is done. Decode rows bring their new keys and values along: they
are put into the block of keys that they belong to, and the rows of the tile that changed go back to the pool, so nothing is read twice. A
query's result depends on its own row alone, bit for bit. Where tiles are not multiples of the lanes, key and value of a token fill a
vector together: the query has zeros where the value lies.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import tensorcore
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.paged_attention.pool import Pool, QuantizedKV, values_of
from pallas_kernels.paged_attention.tpu_plan import FIELDS, Items
from pallas_kernels.tensorcore import LANES, Call, Copies, ceil_to, sublanes
from pallas_kernels.tensorcore_softmax import Softmax, Step, absorb, finish, query_lanes, start, visible


class Plan(NamedTuple):
    """Static shape: blocks of `tokens` queries, `group` heads each, as `lines` rows of a matrix per kv head; `pages` of a block of keys,
    of which `step` are multiplied at a time, for `heads` kv heads at once; `new`: tokens of a row that are written (0: none)."""

    spec: AttentionSpec
    head_dim: int
    tokens: int
    group: int
    lines: int
    pages: int
    step: int
    heads: int
    width: int
    new: int
    cores: int
    vmem: int


class Arrays(NamedTuple):
    """In HBM: queries, and new keys and values with their scales (float32) for decode rows."""

    q: Any  # [blocks, kv_heads, lines, lanes]
    new: Any  # [rows, new, kv_heads, new_lanes], or None


class Kernel(NamedTuple):
    """What the parts of the kernel see."""

    plan: Plan
    copies: Copies
    items: Any
    tables: Any
    arrays: Arrays
    sinks: Any
    out: Any
    pool: Any
    scratch: "Scratch"


class Scratch(NamedTuple):
    """VMEM: two of everything that is copied; the running softmax; counts (SMEM): tiles on their way back from each buffer of keys,
    blocks that are done; semaphores."""

    q: Any
    new: Any
    out: Any
    keys: Any
    scales: Any
    tiles: Any
    softmax: Softmax
    counts: Any
    q_done: Any
    keys_done: Any
    back_done: Any
    out_done: Any


def vmem_bytes(plan: Plan, q: Any, kv: Any) -> int:
    """VMEM that the kernel needs: two buffers of everything, the softmax, and a step's scores and operands."""
    values = values_of(kv)
    _, kv_heads, page_size, lanes = values.shape
    wide, step = query_lanes(plan.head_dim), plan.step * page_size
    keys = 2 * kv_heads * plan.pages * page_size * lanes * values.dtype.itemsize
    scales = 2 * plan.pages * ceil_to(kv_heads, 8) * ceil_to(2 * page_size, LANES) * 4 if isinstance(kv, QuantizedKV) else 0
    queries = kv_heads * ceil_to(plan.lines, 8) * (4 * q.dtype.itemsize * wide + 4 * (wide + 2 * LANES))
    return keys + scales + queries + plan.heads * step * (16 * ceil_to(plan.lines, 8) + 8 * lanes)


def attend(
    arrays: Arrays, kv: Pool, items: Items, tables: Int32[Array, "rows width"], sinks: Float[Array, "lines lanes"] | None, plan: Plan
) -> tuple[Float[Array, "blocks kv_heads lines out_lanes"], Pool]:
    """Attention of the blocks' queries (whatever for those of no item) and the pool with the new keys and values."""
    given, tree = jax.tree.flatten((arrays, kv))
    pools, pool_tree = jax.tree.flatten(kv)
    out = jax.ShapeDtypeStruct(arrays.q.shape, arrays.q.dtype)
    scratch, made = jax.tree.flatten(_scratch(plan, arrays, kv))

    def body(copies: Copies, scalars: Any, hbm: Any, constants: Any, outputs: Any, own: Any) -> None:
        inside, _ = jax.tree.unflatten(tree, hbm)
        pool = jax.tree.unflatten(pool_tree, outputs[1:])
        bounds, fields, table = scalars
        sinks = constants[0] if constants else None
        kernel = Kernel(plan, copies, fields, table, inside, sinks, outputs[0], pool, jax.tree.unflatten(made, own))
        _core(kernel, bounds)

    call = Call(
        "paged_attention",
        [out, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pools)],
        scratch,
        {len(given) - len(pools) + number: 1 + number for number in range(len(pools))},
        _cost(plan, arrays, kv, tables.shape[0]),
        plan.cores,
        plan.vmem,
    )
    found = tensorcore.run(
        call, body, (items.bounds, items.fields, tables.reshape(-1)), given, () if sinks is None else (sinks,)
    )
    return found[0], jax.tree.unflatten(pool_tree, found[1:])


def _scratch(plan: Plan, arrays: Arrays, kv: Pool) -> Scratch:
    values = values_of(kv)
    _, kv_heads, page_size, lanes = values.shape
    vmem, queries = pltpu.VMEM, (2, *arrays.q.shape[1:])
    out = (kv_heads, plan.lines, query_lanes(plan.head_dim))
    quantised = isinstance(kv, QuantizedKV)
    return Scratch(
        q=vmem(queries, arrays.q.dtype),
        new=None if arrays.new is None else vmem((2, *arrays.new.shape[1:]), jnp.float32),
        out=vmem((2, *out), arrays.q.dtype),
        keys=vmem((2, kv_heads, plan.pages * page_size, lanes), values.dtype),
        scales=vmem((2, plan.pages, kv_heads, 2 * page_size), jnp.float32) if quantised else None,
        tiles=vmem((2, 2, kv_heads, sublanes(values.dtype), lanes), values.dtype) if plan.new else None,
        softmax=Softmax.scratch(*out),
        counts=pltpu.SMEM((3,), jnp.int32),
        q_done=pltpu.SemaphoreType.DMA((2,)),
        keys_done=pltpu.SemaphoreType.DMA((2,)),
        back_done=pltpu.SemaphoreType.DMA((2,)),
        out_done=pltpu.SemaphoreType.DMA((2,)),
    )


def _cost(plan: Plan, arrays: Arrays, kv: Pool, rows: int) -> pl.CostEstimate:
    """Of rows that are half full: what XLA schedules other work around."""
    _, kv_heads, page_size, lanes = values_of(kv).shape
    keys = rows * plan.width * page_size // 2
    blocks, _, lines, _ = arrays.q.shape
    pairs = max(blocks // max(rows, 1), 1) * keys * kv_heads * lines
    moved = max(blocks // max(rows, 1), 1) * keys * kv_heads * lanes * values_of(kv).dtype.itemsize
    moved += 2 * arrays.q.size * arrays.q.dtype.itemsize
    return pl.CostEstimate(flops=4 * pairs * plan.head_dim, transcendentals=pairs, bytes_accessed=moved)


def _field(kernel: Kernel, item: Any, name: str) -> Any:
    return kernel.items[item * len(FIELDS) + FIELDS.index(name)]


def _core(kernel: Kernel, bounds: Any) -> None:
    """All items of one core."""
    core = pl.program_id(0)
    begin, end = bounds[core], bounds[core + 1]
    for count in range(3):
        kernel.scratch.counts[count] = 0

    @pl.when(begin < end)
    def _first() -> None:
        _copy_queries(kernel, begin, start=True)
        _copy_keys(kernel, begin, 0, 0, start=True)

    lax.fori_loop(begin, end, lambda item, slot: _attend_item(kernel, item, end, slot), jnp.int32(0))
    for slot in range(2):
        _await_tiles(kernel, slot)
        pl.when(kernel.scratch.counts[2] > slot)(lambda slot=slot: _copy_out(kernel, 0, slot, start=False))


def _attend_item(kernel: Kernel, item: Any, end: Any, slot: Any) -> Any:
    """One item's blocks of keys, beginning in buffer `slot`; returns the buffer that the next item begins in."""
    plan = kernel.plan
    blocks = lax.div(_field(kernel, item, "pages") + (plan.pages - 1), jnp.int32(plan.pages))
    half = lax.rem(_field(kernel, item, "ordinal"), jnp.int32(2))
    kv_heads, out = values_of(kernel.pool).shape[1], kernel.scratch.out

    def settle(head: Any, place: Any) -> None:
        out[place, head] = finish(kernel.scratch.softmax, head, out.dtype)

    @pl.when(_field(kernel, item, "fresh") == 1)
    def _begin() -> None:
        _copy_queries(kernel, item, start=False)
        following = _field(kernel, item, "next")
        pl.when(following < end)(lambda: _copy_queries(kernel, following, start=True))
        lax.fori_loop(0, kv_heads, lambda head, _: start(kernel.scratch.softmax, head, kernel.sinks, column=head), None)

    def step(block: Any, slot: Any) -> Any:
        more = block + 1 < blocks
        following, its_block = jnp.where(more, item, item + 1), jnp.where(more, block + 1, 0)

        @pl.when(more | (item + 1 < end))
        def _ahead() -> None:
            _await_tiles(kernel, 1 - slot)
            _copy_keys(kernel, following, its_block, 1 - slot, start=True)

        _copy_keys(kernel, item, block, slot, start=False)
        _attend_block(kernel, item, block, slot, half)
        return 1 - slot

    slot = lax.fori_loop(0, blocks, step, slot)

    @pl.when(_field(kernel, item, "final") == 1)
    def _finish() -> None:
        done = kernel.scratch.counts[2]
        place = lax.rem(done, jnp.int32(2))
        pl.when(done >= 2)(lambda: _copy_out(kernel, 0, place, start=False))
        lax.fori_loop(0, kv_heads, lambda head, _: settle(head, place), None)
        _copy_out(kernel, _field(kernel, item, "block"), place, start=True)
        kernel.scratch.counts[2] = done + 1

    return slot


def _copy_queries(kernel: Kernel, item: Any, *, start: bool) -> None:
    block, half = _field(kernel, item, "block"), lax.rem(_field(kernel, item, "ordinal"), jnp.int32(2))
    act, semaphore = kernel.copies.start if start else kernel.copies.wait, kernel.scratch.q_done.at[half]
    act(kernel.arrays.q.at[block], kernel.scratch.q.at[half], semaphore)
    if kernel.arrays.new is not None:
        act(kernel.arrays.new.at[block], kernel.scratch.new.at[half], semaphore)


def _copy_out(kernel: Kernel, block: Any, place: Any, *, start: bool) -> None:
    act = kernel.copies.start if start else kernel.copies.wait
    act(kernel.scratch.out.at[place], kernel.out.at[block], kernel.scratch.out_done.at[place])


def _copy_keys(kernel: Kernel, item: Any, block: Any, slot: Any, *, start: bool) -> None:
    """A block of an item's keys and values, page by page."""
    plan, values = kernel.plan, values_of(kernel.pool)
    page_size, semaphore = values.shape[2], kernel.scratch.keys_done.at[slot]
    act = kernel.copies.start if start else kernel.copies.wait
    first = _field(kernel, item, "row") * plan.width + _field(kernel, item, "page") + block * plan.pages
    count = jnp.minimum(_field(kernel, item, "pages") - block * plan.pages, plan.pages)

    def one(number: Any, _: None) -> None:
        page = kernel.tables[first + number] if start else 0
        place = pl.ds(pl.multiple_of(number * page_size, page_size), page_size)
        act(values.at[page], kernel.scratch.keys.at[slot, :, place, :], semaphore)
        if isinstance(kernel.pool, QuantizedKV):
            act(kernel.pool.scales.at[page], kernel.scratch.scales.at[slot, number], semaphore)

    lax.fori_loop(0, count, one, None)


def _copy_tile(kernel: Kernel, source: Any, place: Any, *, start: bool) -> None:
    """A tile of rows with new keys and values to the pool; source: buffer, tile, and page in the buffer; place: page and row there."""
    act, values = kernel.copies.start if start else kernel.copies.wait, values_of(kernel.pool)
    (slot, tile, number), (page, row), rows = source, place, sublanes(values.dtype)
    semaphore = kernel.scratch.back_done.at[slot]
    act(kernel.scratch.tiles.at[slot, tile], values.at[page, :, pl.ds(pl.multiple_of(row, rows), rows), :], semaphore)
    if isinstance(kernel.pool, QuantizedKV):
        act(kernel.scratch.scales.at[slot, number], kernel.pool.scales.at[page], semaphore)


def _await_tiles(kernel: Kernel, slot: Any) -> None:
    """Until the tiles that go back from a buffer are there."""
    if kernel.plan.new:
        zero = jnp.int32(0)
        lax.fori_loop(0, kernel.scratch.counts[slot], lambda _, __: _copy_tile(kernel, (slot, 0, 0), (0, zero), start=False), None)
        kernel.scratch.counts[slot] = 0


def _attend_block(kernel: Kernel, item: Any, block: Any, slot: Any, half: Any) -> None:
    """The keys in a buffer, `step` pages at a time: as many as somebody sees, and what nobody owns made zero before."""
    plan, page_size = kernel.plan, values_of(kernel.pool).shape[2]
    size, first = plan.step * page_size, _field(kernel, item, "page") * page_size + block * (plan.pages * page_size)
    known = jnp.minimum(_field(kernel, item, "stop") - first, plan.pages * page_size)
    steps = lax.div(known + (size - 1), jnp.int32(size))
    if plan.new:
        _put_new(kernel, item, first, slot, half)
    if values_of(kernel.pool).dtype != jnp.int8:
        _clear(kernel, slot, known, steps * size)
    lowest = _field(kernel, item, "position") + _field(kernel, item, "begin")
    whole = (_field(kernel, item, "begin") == 0) & (_field(kernel, item, "end") == plan.tokens)

    def step(number: Any, _: None) -> None:
        begin = first + number * size
        free = whole & (begin + size - 1 <= lowest)
        if plan.spec.window is not None:
            free &= begin > lowest + (plan.tokens - 1 - plan.spec.window)

        def multiply(*, masked: bool) -> None:
            parts = values_of(kernel.pool).shape[1] // plan.heads
            lax.fori_loop(
                0, parts, lambda part, _: _multiply(kernel, item, (number, begin), part, (slot, half), masked=masked), None
            )

        if plan.new:
            multiply(masked=True)
        else:
            pl.when(free)(lambda: multiply(masked=False))
            pl.when(~free)(lambda: multiply(masked=True))

    lax.fori_loop(0, steps, step, None)


def _put_new(kernel: Kernel, item: Any, first: Any, slot: Any, half: Any) -> None:
    """New keys and values into the buffer that begins with key `first`, and the tiles that changed on their way to the pool."""
    plan, scratch, values = kernel.plan, kernel.scratch, values_of(kernel.pool)
    rows, page_size = sublanes(values.dtype), values.shape[2]
    count, begin = _field(kernel, item, "end"), _field(kernel, item, "position") - first
    table = _field(kernel, item, "row") * plan.width + lax.div(first, jnp.int32(page_size))
    for which in range(1 if plan.new == 1 else 2):
        tile = lax.div(jnp.maximum(begin, 0), jnp.int32(rows)) + which
        row = pl.multiple_of(tile * rows, rows)
        touched = (row < begin + count) & (row + rows > begin) & (row < plan.pages * page_size)

        @pl.when(touched)
        def _(row: Any = row, which: int = which) -> None:
            place = pl.ds(row, rows)
            old = scratch.keys[slot, :, place, :]
            wide = old.astype(jnp.float32)
            lane = lax.broadcasted_iota(jnp.int32, wide.shape, 1) + row
            for token in range(plan.new):
                mine = (lane == begin + token) & (token < count)
                wide = jnp.where(mine, scratch.new[half, token][:, None, : wide.shape[2]], wide)
            scratch.keys[slot, :, place, :] = scratch.tiles[slot, which] = _narrow(wide, values.dtype)
            page = lax.div(row, jnp.int32(page_size))
            if isinstance(kernel.pool, QuantizedKV):  # once a page: the tile before has begun to copy those of its own
                fresh = (which == 0) | (page != lax.div(row - rows, jnp.int32(page_size)))
                pl.when(fresh)(lambda: _put_scales(kernel, slot, half, page, begin, count))
            _copy_tile(kernel, (slot, which, page), (kernel.tables[table + page], lax.rem(row, jnp.int32(page_size))), start=True)
            scratch.counts[slot] = scratch.counts[slot] + 1


def _put_scales(kernel: Kernel, slot: Any, half: Any, page: Any, begin: Any, count: Any) -> None:
    scratch, page_size, lanes = kernel.scratch, values_of(kernel.pool).shape[2], values_of(kernel.pool).shape[3]
    scales = scratch.scales[slot, page]
    lane = lax.broadcasted_iota(jnp.int32, scales.shape, 1)
    for token in range(kernel.plan.new):
        own, at = scratch.new[half, token][:, lanes:], begin + token - page * page_size
        inside = (at >= 0) & (at < page_size) & (token < count)
        scales = jnp.where((lane == at) & inside, own[:, 0:1], scales)
        scales = jnp.where((lane == at + page_size) & inside, own[:, 1:2], scales)
    scratch.scales[slot, page] = scales


def _narrow(x: Any, dtype: Any) -> Any:
    """float32 to the dtype of a pool."""
    return x.astype(jnp.int32).astype(jnp.int8) if dtype == jnp.int8 else x.astype(dtype)


def _clear(kernel: Kernel, slot: Any, known: Any, stop: Any) -> None:
    """Zero rows [known, stop) of a buffer: a weight of 0 times NaN is NaN."""
    keys = kernel.scratch.keys
    rows = sublanes(keys.dtype)

    def one(tile: Any, _: None) -> None:
        place = pl.ds(pl.multiple_of(tile * rows, rows), rows)
        old = keys[slot, :, place, :]
        row = lax.broadcasted_iota(jnp.int32, old.shape, 1) + tile * rows
        keys[slot, :, place, :] = jnp.where(row < known, old.astype(jnp.float32), 0.0).astype(keys.dtype)

    lax.fori_loop(lax.div(known, jnp.int32(rows)), lax.div(stop, jnp.int32(rows)), one, None)


def _multiply(kernel: Kernel, item: Any, step: Any, part: Any, buffers: Any, *, masked: bool) -> None:
    """One step's keys enter the online softmax of `heads` kv heads: those of part `part`."""
    plan, scratch, (number, begin), (slot, half) = kernel.plan, kernel.scratch, step, buffers
    size = plan.step * values_of(kernel.pool).shape[2]
    heads = pl.ds(part * plan.heads, plan.heads)
    key = lax.broadcasted_iota(jnp.int32, (1, 1, size), 2) + begin
    scales = None
    if scratch.scales is not None:
        of_keys, of_values = _scales(kernel, number, heads, slot)
        scales = of_keys, jnp.where(key < _field(kernel, item, "stop"), of_values, 0.0)
    both = scratch.keys[slot, heads, pl.ds(pl.multiple_of(number * size, size), size), :]
    seen, window = None, plan.spec.window
    if masked:
        between = _field(kernel, item, "begin"), _field(kernel, item, "end")
        seen = visible(plan.lines, key, position=_field(kernel, item, "position"), group=plan.group, window=window, between=between)
    absorb(scratch.softmax, heads, Step(scratch.q[half, heads], both, scales), seen, spec=plan.spec, head_dim=plan.head_dim)


def _scales(kernel: Kernel, number: Any, heads: Any, slot: Any) -> tuple[Any, Any]:
    """Of a step's keys and of its values: [heads, 1, keys] each."""
    plan, page_size = kernel.plan, values_of(kernel.pool).shape[2]
    found = [kernel.scratch.scales[slot, number * plan.step + page, heads, :] for page in range(plan.step)]
    keys, values = (
        jnp.concatenate([each[:, which * page_size : (which + 1) * page_size] for each in found], axis=1) for which in range(2)
    )
    return keys[:, None], values[:, None]
