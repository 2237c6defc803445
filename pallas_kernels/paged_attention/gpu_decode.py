"""A few queries per row over its pages, for Hopper: flash decoding, cut over keys so that a few long rows fill the GPU too.

A row's keys are cut into chunks; an item is a chunk of a row. Blocks of threads stay for the whole kernel and take (item, head) pairs
in turn; a head is a tile of lines of one kv head: some tokens' groups of queries. Each block has `streams` pairs of warpgroups: a
producer copies blocks of keys and values, a consumer attends with the lines and leaves the chunk's normalised output and the logarithm
of its sum, which `gpu_combine` merges, in a kernel of its own or here: whoever ends a row's last chunk does (`hopper_counters`), in the
same order. Where the pool holds 8-bit codes the consumer makes numbers of keys as it multiplies them, and the
producer of values, for the consumer's next step.
Sources: FlashAttention-2 (arXiv 2307.08691), Flash-Decoding (Dao et al., 2023), PagedAttention (arXiv 2309.06180).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import hopper, hopper_codes, hopper_columns, hopper_counters
from pallas_kernels.hopper_columns import Room, State
from pallas_kernels.paged_attention.gpu_combine import Places, merge_row
from pallas_kernels.paged_attention.gpu_plan import ITEM, KEYS, TILES, Feed, Item, Plan, Refs, Scratch, scratch_of


class Counted(NamedTuple):
    """For the merging: how many chunks each row has, and the program's counters, one for each row and head."""

    counts: Int32[Array, "rows"]
    counters: Any


class Decoded(NamedTuple):
    """What chunks came to, and rows if they were merged."""

    parts: Float[Array, "slots padded head_dim"]
    sums: Float[Array, "slots padded"]
    merged: Float[Array, "rows_heads lines head_dim"] | None = None


def decode(  # noqa: PLR0913
    q: Float[Array, "kv_heads lines head_dim"],
    kv: Array,
    tables: Int32[Array, "rows_width"],
    items: Int32[Array, "items_6"],
    count: Int32[Array, "1"],
    scales: Float[Array, "pool_rows"] | None = None,
    *,
    rows: int,
    plan: Plan,
    counted: Counted | None = None,
) -> Decoded:
    """Output of each item, normalised, and the base 2 logarithm of the sum of its weights; each row's merged if the plan says so.

    q: `padded` lines for each tile of each of the rows, more may follow. kv: the pool's numbers or codes [pool_rows, head_dim]. slots are
    rows x max_chunks x heads; those without an item hold anything. items: ITEM for each, the first `count` are real.
    """
    head_dim, dtype = q.shape[2], q.dtype
    slots = rows * plan.max_chunks * plan.heads
    if scales is not None:
        q = hopper_codes.permute(q[:, : rows * plan.tiles * plan.padded])
    given = {"q": q, "kv": kv, "tables": tables, "items": items, "count": count}
    given |= {} if scales is None else {"scales": scales}
    given |= {} if plan.merge is None or counted is None else counted._asdict()
    made, tree = jax.tree.flatten(scratch_of(plan, head_dim, dtype))
    outputs = {
        "out": jax.ShapeDtypeStruct((slots, plan.padded, head_dim), dtype),
        "sums": jax.ShapeDtypeStruct((slots, plan.padded), jnp.float32),
    }
    outputs |= {} if plan.merge is None else {"merged": plan.merge.out(rows, dtype)}

    def body(*refs: Any) -> None:
        *arrays, own = refs
        names = dict(zip((*given, *outputs), arrays, strict=True))
        _body(plan, Refs(**{"scales": None} | names), jax.tree.unflatten(tree, own))

    found = hopper.kernel(
        body,
        tuple(made),
        out_type=tuple(outputs.values()),
        grid={"block": plan.blocks},
        registers=[number for number in plan.registers for _ in range(plan.streams)],
    )(*given.values())
    return Decoded(*found)


def _body(plan: Plan, refs: Refs, scratch: Scratch) -> None:
    warpgroup = lax.axis_index("wg")
    stream = lax.rem(warpgroup, jnp.int32(plan.streams))
    number, of = stream * plan.blocks + lax.axis_index("block"), plan.blocks * plan.streams  # every block gets work before any gets two
    mine = lax.div(refs.count[0] * plan.heads - number + (of - 1), jnp.int32(of))

    def item(turn: Any) -> Item:
        work = number + turn * of
        head, index = lax.rem(work, jnp.int32(plan.heads)), lax.div(work, jnp.int32(plan.heads))
        row, chunk, first, blocks, stop, sees = (refs.items[index * len(ITEM) + field] for field in range(len(ITEM)))
        return Item((row * plan.max_chunks + chunk) * plan.heads + head, head, row, first, blocks, stop, sees)

    @pl.when(warpgroup < plan.streams)
    def _consumer() -> None:
        plgpu.set_max_registers(plan.registers[0], action="increase")
        if plan.merge is not None:
            _clear_empty(plan, refs, number, of)
        lax.fori_loop(0, mine, lambda turn, used: _consume(plan, refs, scratch, stream, item(turn), used), jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup >= plan.streams)
    def _producer() -> None:
        plgpu.set_max_registers(plan.registers[1], action="decrease")

        if plan.codes is not None:
            pl.when(mine > 0)(lambda: _supply(plan, refs, scratch, stream, item, mine))
            return

        def turn(turn: Any, used: Any) -> Any:  # the queries' memory comes free late: what has room is copied before
            own = item(turn)
            ahead = jnp.minimum(own.blocks, plan.stages - 1)
            _produce(plan, refs, scratch, stream, own, used, begin=0, end=ahead)
            pl.when(turn > 0)(lambda: plgpu.barrier_wait(scratch.q_free.at[stream]))
            _copy_queries(plan, refs, scratch, stream, own)
            _produce(plan, refs, scratch, stream, own, used, begin=ahead, end=own.blocks)
            return used + own.blocks

        used = lax.fori_loop(0, mine, turn, jnp.int32(0))
        pl.when(mine > 0)(lambda: plgpu.barrier_wait(scratch.q_free.at[stream]))
        hopper.drain(lambda slot: scratch.free.at[stream, slot], used, plan.stages)


def _copy_queries(plan: Plan, refs: Refs, scratch: Scratch, stream: Any, item: Item) -> None:
    tiles = jnp.int32(plan.tiles)
    first = (item.row * tiles + lax.rem(item.head, tiles)) * plan.padded
    plgpu.copy_gmem_to_smem(
        refs.q.at[lax.div(item.head, tiles), pl.ds(pl.multiple_of(first, plan.padded), plan.padded)],
        scratch.q.at[stream],
        scratch.q_full.at[stream],
    )


def _find(plan: Plan, refs: Refs, item: Item, number: Any) -> list[Any]:
    """Where an item's block lies in the pool."""
    return plan.pages.at(refs.tables, item.row, lax.div(item.head, jnp.int32(plan.tiles)), item.first + number, KEYS)


def _copy(plan: Plan, refs: Refs, scratch: Scratch, stream: Any, slot: Any, at: Any) -> None:
    """Start copying a block that lies there, with its scales if it has any."""
    barrier = scratch.full.at[stream, slot]
    arrays = [(refs.kv, scratch.kv.at[stream].at[slot])]
    if plan.codes is not None:
        arrays.append((refs.scales, scratch.scales.at[stream].at[slot]))
    for pool, into in arrays:
        if plan.together:
            plgpu.copy_gmem_to_smem(pool.at[pl.ds(at[0], 2 * KEYS)], into, barrier)
            continue
        for which in range(2):
            plan.pages.copy(pool, at, which, into.at[pl.ds(which * KEYS, KEYS)], barrier)


def _produce(plan: Plan, refs: Refs, scratch: Scratch, stream: Any, item: Item, used: Any, *, begin: Any, end: Any) -> None:
    """Copy an item's blocks from `begin` to `end`; `used` counts the blocks that the stream had before the item."""

    def copy(number: Any, _: None) -> None:
        slot = lax.rem(used + number, jnp.int32(plan.stages))
        at = _find(plan, refs, item, number)
        pl.when(used + number >= plan.stages)(lambda: plgpu.barrier_wait(scratch.free.at[stream, slot]))
        _copy(plan, refs, scratch, stream, slot, at)

    lax.fori_loop(begin, end, copy, None)


def _supply(plan: Plan, refs: Refs, scratch: Scratch, stream: Any, item: Callable[[Any], Item], mine: Any) -> None:
    """A producer of codes: it copies blocks ahead, across items, and converts the values of each.

    A block's memory comes free when the consumer has read its keys, which it does while the values are converted. What is copied next is
    looked up one block early, so that nobody waits for the tables.
    """

    def look(turn: Any, number: Any) -> tuple[Any, ...]:
        found = item(jnp.minimum(turn, mine - 1))
        return turn, number, found.blocks, *_find(plan, refs, found, number)

    def copy_next(count: Any, ahead: tuple[Any, ...]) -> tuple[Any, ...]:
        turn, number, blocks, *begins = ahead
        at = [pl.multiple_of(begin, plan.pages.piece(KEYS)) for begin in begins]
        pl.when(turn < mine)(lambda: _copy(plan, refs, scratch, stream, lax.rem(count, jnp.int32(plan.stages)), at))
        done = number + 1 >= blocks
        return look(jnp.where(done, turn + 1, turn), jnp.where(done, 0, number + 1))

    def turn(turn: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
        pl.when(turn > 0)(lambda: plgpu.barrier_wait(scratch.q_free.at[stream]))
        _copy_queries(plan, refs, scratch, stream, item(turn))

        def block(_: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
            used, *ahead = state
            pl.when(used > 0)(lambda: plgpu.barrier_wait(scratch.free.at[stream, lax.rem(used - 1, jnp.int32(plan.stages))]))
            ahead = copy_next(used + (plan.stages - 1), tuple(ahead))
            _convert(plan, scratch, stream, used)
            return used + 1, *ahead

        return lax.fori_loop(0, item(turn).blocks, block, state)

    ahead = look(jnp.int32(0), jnp.int32(0))
    for count in range(plan.stages - 1):
        ahead = copy_next(jnp.int32(count), ahead)
    used, *_ = lax.fori_loop(0, mine, turn, (jnp.int32(0), *ahead))
    plgpu.barrier_wait(scratch.q_free.at[stream])
    plgpu.barrier_wait(scratch.free.at[stream, lax.rem(used - 1, jnp.int32(plan.stages))])
    hopper.drain(lambda tile: scratch.tiles.free.at[stream, tile], used, TILES)


def _convert(plan: Plan, scratch: Scratch, stream: Any, block: Any) -> None:
    """The codes of a block's values become a tile of numbers."""
    tiles, slot, tile = scratch.tiles, lax.rem(block, jnp.int32(plan.stages)), lax.rem(block, jnp.int32(TILES))
    plgpu.barrier_wait(scratch.full.at[stream, slot])
    pl.when(block >= TILES)(lambda: plgpu.barrier_wait(tiles.free.at[stream, tile]))
    hopper_codes.unpack(scratch.kv.at[stream].at[slot].at[pl.ds(KEYS, KEYS)], tiles.values.at[stream].at[tile])
    plgpu.commit_smem()
    plgpu.barrier_arrive(tiles.full.at[stream, tile])


def _consume(plan: Plan, refs: Refs, scratch: Scratch, stream: Any, item: Item, used: Any) -> Any:
    """Attend to an item's blocks and write its result; `used` counts the blocks that the stream has had."""
    q, sums, feed = scratch.q.at[stream], scratch.sums.at[stream], Feed(plan, scratch, stream, used)
    room = scratch.room.of(stream)
    plgpu.barrier_wait(scratch.q_full.at[stream])

    def absorb(number: Any, state: State, *, last: bool) -> State:
        products, scales = _multiply(feed, number, q)
        feed.keys_used(number)
        if last:
            plgpu.barrier_arrive(scratch.q_free.at[stream])
        state = _weigh(feed, item, number, products, scales, state, room)
        if not last:
            feed.values_used(number)
        return state

    state = lax.fori_loop(0, item.blocks - 1, partial(absorb, last=False), hopper_columns.start(q.shape[1], KEYS, plan.padded))
    state = absorb(item.blocks - 1, state, last=True)
    out = feed.values(item.blocks - 1).at[pl.ds(0, plan.padded)]  # the last values have been used: the output leaves from their memory
    total = hopper_columns.total(state, room)
    sums[...] = state.top + jnp.log2(total)
    if plan.tokens > 1:  # a token may see nothing of a chunk
        total = jnp.where(total > 0, total, jnp.ones_like(total))
    hopper_columns.mean(state, total, out)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, refs.out.at[item.slot])
    plgpu.copy_smem_to_gmem(sums, refs.sums.at[item.slot])
    plgpu.wait_smem_to_gmem(0, wait_read_only=plan.merge is None)
    feed.values_used(item.blocks - 1)
    if plan.merge is not None:
        _merge_if_last(plan, refs, item, scratch.told.at[pl.ds(stream, 1)])
    return used + item.blocks


def _merge_if_last(plan: Plan, refs: Refs, item: Item, told: Any) -> None:
    """Count the chunk, which is in memory; if all of its row are, merge them."""
    count, place = refs.counts[item.row], hopper_counters.FIRST + item.row * plan.heads + item.head

    @pl.when(hopper_counters.last(refs.counters, place, count, told))
    def _merge() -> None:
        for part in range(plan.merge.parts):
            merge_row(plan.merge, Places(refs.out, refs.sums, refs.merged), item.row, item.head, part, count)


def _clear_empty(plan: Plan, refs: Refs, number: Any, of: int) -> None:
    """Rows without any chunk are zeros; `number` of `of` consumers has every `of`th row."""
    rows = refs.counts.shape[0]

    def clear(turn: Any, _: None) -> None:
        row = number + turn * of

        @pl.when(refs.counts[row] == 0)
        def _clear() -> None:
            for head in range(plan.heads):
                for part in range(plan.merge.parts):
                    lines = pl.ds(part * plan.merge.heads, plan.merge.heads)
                    refs.merged[row * plan.heads + head, lines] = plan.merge.zeros().astype(refs.merged.dtype)

    lax.fori_loop(0, lax.div(rows - number + (of - 1), jnp.int32(of)), clear, None)


def _multiply(feed: Feed, number: Any, q: Any) -> tuple[Any, Any]:
    """A block's keys times the queries [keys, queries], and the scales of its values (None without codes)."""
    keys = feed.keys(number)
    if feed.plan.codes is None:
        return hopper_columns.products(keys, q), None
    of_keys, of_values = feed.scales(number)
    spilled = None if feed.scratch.tiles.keys is None else feed.scratch.tiles.keys.at[feed.stream]
    products = hopper_columns.products(hopper_codes.operand(keys, q.dtype), q, spilled)
    return products * hopper.spread(of_keys, products.shape), of_values


def _weigh(feed: Feed, item: Item, number: Any, products: Any, scales: Any, state: State, room: Room) -> State:
    """A block's products enter the softmax, and its values what is weighted."""
    plan, first, values = feed.plan, (item.first + number) * KEYS, feed.values(number)
    floor = None if plan.spec.window is None else item.sees - plan.spec.window
    scores, factor = hopper.shape_scores(products, plan.spec)
    seen = _seen(plan, item, first, floor)
    share, decay, state = hopper_columns.weights(state, jnp.where(seen, scores, -jnp.inf), factor, room)
    feed.wait_for_values(number)
    if scales is not None:  # those of no row may be NaN
        share = jnp.where(seen, share * hopper.spread(scales, share.shape), jnp.zeros_like(share))
    if plan.codes != jnp.int8:  # 0 times an integer is 0
        hopper.clear(values, first, floor, item.stop)
    return hopper_columns.weigh(state, share, decay, values, room)


def _seen(plan: Plan, item: Item, first: Any, floor: Any) -> Any:
    """Which lines see each key of the block from key `first` on; floor: below what the row's first token sees."""
    shape = (KEYS, plan.padded)
    key = hopper.index(shape, 0, first)
    if plan.tokens * plan.tiles == 1:
        seen = key < item.stop
        return seen if floor is None else seen & (key >= floor)
    line = hopper.index(shape, 1, 0)
    power = plan.group & (plan.group - 1) == 0
    token = line >> (plan.group.bit_length() - 1) if power else lax.div(line, jnp.full_like(line, plan.group))
    token = token + lax.rem(item.head, jnp.int32(plan.tiles)) * plan.tokens
    seen = (key < item.sees + token) & (key < item.stop)
    return seen if floor is None else seen & (key >= floor + token)
