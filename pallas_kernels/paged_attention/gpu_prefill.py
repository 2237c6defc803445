"""Ragged tiles of queries over their rows' pages, for Hopper, each kv head's group of queries packed into the tile.

A tile has 2 x 64 lines: two warpgroups' consecutive tokens, each token with the query heads of one kv head. Blocks of threads stay for
the whole kernel and take (tile, kv head) pairs in turn, in the caller's order. A third warpgroup copies keys and values. The two
take turns on the tensor cores, so that one's softmax runs while the other multiplies (FlashAttention-3, arXiv 2407.08608); blocks of
keys that all queries of a warpgroup see need no mask. A query's result depends on its row alone, bit for bit.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import hopper
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.hopper import LOG2E, ROWS, TILE
from pallas_kernels.paged_attention.gpu_pages import Pages

CONSUMERS = 2  # warpgroups that attend
LINES = CONSUMERS * TILE  # of a tile of queries
TILE_FIELDS = ("place", "row", "first position", "tokens", "stop")  # the integers of a tile; stop: keys of the row


class Plan(NamedTuple):
    """Static shape of a prefill: `group` query heads per kv head, blocks of `keys` keys, `stages` of them at once in shared memory."""

    spec: AttentionSpec
    pages: Pages
    group: int
    keys: int
    stages: int
    blocks: int  # of threads
    has_sinks: bool

    @property
    def tokens(self) -> int:
        """Tokens of a warpgroup."""
        return TILE // self.group


class Refs(NamedTuple):
    """The kernel's arrays."""

    q: Any
    kv: Any
    tables: Any
    tiles: Any
    count: Any
    sinks: Any
    out: Any


class Scratch(NamedTuple):
    """Shared memory and barriers: queries once per consumer, keys and values once per stage."""

    q: Any
    k: Any
    v: Any
    q_full: Any
    q_free: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    turn: Any
    spill: Any = None


class Tile(NamedTuple):
    """A tile for one kv head: its place among the queries, first token's position, and the blocks of keys that it sees."""

    place: Any
    head: Any
    row: Any
    first: Any
    begin: Any
    end: Any
    stop: Any


def shared_bytes(head_dim: int, keys: int, stages: int) -> int:
    """Shared memory of a block of threads, for 16-bit data."""
    return 2 * head_dim * (LINES + 2 * stages * keys) + 8 * (2 * CONSUMERS + 4 * stages + 1) + hopper.REDUCTION_BYTES


def prefill(
    q: Float[Array, "kv_heads lines head_dim"],
    kv: Float[Array, "pool_rows head_dim"],
    tables: Int32[Array, "rows_width"],
    tiles: Int32[Array, "tiles_5"],
    count: Int32[Array, "1"],
    sinks: Float[Array, "kv_heads tile"] | None,
    *,
    plan: Plan,
) -> Float[Array, "kv_heads lines head_dim"]:
    """Attention of the first `count` tiles (TILE_FIELDS each), at their places in q; the other places hold anything.

    sinks: the score of each line of a warpgroup's queries.
    """
    head_dim, dtype = q.shape[2], q.dtype
    pieces = plan.pages.pieces(plan.keys)
    scratch = (
        hopper.swizzled((CONSUMERS, TILE, head_dim), dtype),
        hopper.swizzled((plan.stages, plan.keys, head_dim), dtype),
        hopper.swizzled((plan.stages, plan.keys, head_dim), dtype),
        plgpu.Barrier(num_barriers=CONSUMERS),
        plgpu.Barrier(num_barriers=CONSUMERS),
        plgpu.Barrier(num_arrivals=pieces, num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=pieces, num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=CONSUMERS),
        *hopper.spill(CONSUMERS, plan.keys, dtype),
    )
    given = jnp.zeros((1, TILE), jnp.float32) if sinks is None else sinks.astype(jnp.float32) * LOG2E
    return hopper.kernel(
        lambda *refs: _body(plan, Refs(*refs[:-1]), Scratch(*refs[-1])),
        scratch,
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        grid={"block": plan.blocks},
        warpgroups=CONSUMERS + 1,
    )(q, kv, tables, tiles, count, given)


def _body(plan: Plan, refs: Refs, scratch: Scratch) -> None:
    warpgroup, number = lax.axis_index("wg"), lax.axis_index("block")
    mine = lax.div(refs.count[0] * plan.pages.kv_heads - number + (plan.blocks - 1), jnp.int32(plan.blocks))

    def tile(turn: Any) -> Tile:
        work = number + turn * plan.blocks
        head, index = lax.rem(work, jnp.int32(plan.pages.kv_heads)), lax.div(work, jnp.int32(plan.pages.kv_heads))
        place, row, first, tokens, stop = (refs.tiles[index * len(TILE_FIELDS) + field] for field in range(len(TILE_FIELDS)))
        floor = jnp.int32(0) if plan.spec.window is None else jnp.maximum(first - (plan.spec.window - 1), 0)
        begin = lax.div(floor, jnp.int32(plan.keys))
        end = lax.div(jnp.minimum(first + tokens, stop) + (plan.keys - 1), jnp.int32(plan.keys))
        return Tile(place, head, row, first, begin, end, stop)

    @pl.when(warpgroup < CONSUMERS)
    def _consumer() -> None:
        plgpu.set_max_registers(232, action="increase")
        lax.fori_loop(0, mine, lambda turn, used: _consume(plan, refs, scratch, tile(turn), used), jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == CONSUMERS)
    def _producer() -> None:
        plgpu.set_max_registers(40, action="decrease")
        used = lax.fori_loop(0, mine, lambda turn, used: _produce(plan, refs, scratch, tile(turn), turn, used), jnp.int32(0))

        @pl.when(mine > 0)
        def _rest() -> None:
            for consumer in range(CONSUMERS):
                plgpu.barrier_wait(scratch.q_free.at[consumer])

        for free in (scratch.k_free, scratch.v_free):
            hopper.drain(lambda slot, free=free: free.at[slot], used, plan.stages)


def _produce(plan: Plan, refs: Refs, scratch: Scratch, tile: Tile, turn: Any, used: Any) -> Any:
    """Copy a tile's queries and its blocks; `used` counts the blocks so far."""
    for consumer in range(CONSUMERS):
        pl.when(turn > 0)(lambda consumer=consumer: plgpu.barrier_wait(scratch.q_free.at[consumer]))
        lines = pl.ds(tile.place * LINES + consumer * TILE, TILE)
        plgpu.copy_gmem_to_smem(refs.q.at[tile.head, lines], scratch.q.at[consumer], scratch.q_full.at[consumer])

    def copy(block: Any, _: None) -> None:
        number = used + block - tile.begin
        slot = lax.rem(number, jnp.int32(plan.stages))
        at = plan.pages.at(refs.tables, tile.row, tile.head, block, plan.keys)
        for which, into, full, free in (
            (0, scratch.k, scratch.k_full, scratch.k_free),
            (1, scratch.v, scratch.v_full, scratch.v_free),
        ):
            pl.when(number >= plan.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            plan.pages.copy(refs.kv, at, which, into.at[slot], full.at[slot])

    lax.fori_loop(tile.begin, tile.end, copy, None)
    return used + tile.end - tile.begin


def _consume(plan: Plan, refs: Refs, scratch: Scratch, tile: Tile, used: Any) -> Any:
    """Attend with one warpgroup's queries of a tile and write the result; `used` counts the blocks so far."""
    warpgroup = lax.axis_index("wg")
    q, first = scratch.q.at[warpgroup], tile.first + warpgroup * plan.tokens
    state = hopper.start(q.shape[1])
    if plan.has_sinks:
        sinks = hopper.load(refs.sinks.at[tile.head], ROWS, coalesced=False)
        state = state._replace(top=sinks, total=state.total + 1)
    plgpu.barrier_wait(scratch.q_full.at[warpgroup])
    pl.when(warpgroup == 1)(lambda: _take_turns(scratch))
    absorb = partial(_absorb, plan, scratch, tile, first, used)
    whole = lax.div(jnp.minimum(first + 1, tile.stop), jnp.int32(plan.keys))  # blocks before it end before the first query
    inside = tile.begin
    if plan.spec.window is not None:  # blocks before it begin before the last query's window
        inside = lax.div(jnp.maximum(first + plan.tokens - plan.spec.window, 0) + (plan.keys - 1), jnp.int32(plan.keys))
        inside = jnp.clip(inside, tile.begin, tile.end)
        state = lax.fori_loop(tile.begin, inside, partial(absorb, masked=True), state)
    whole = jnp.clip(whole, inside, tile.end)
    state = lax.fori_loop(inside, whole, partial(absorb, masked=False), state)
    state = lax.fori_loop(whole, tile.end, partial(absorb, masked=True), state)
    pl.when(warpgroup == 0)(lambda: _take_turns(scratch))
    q[...] = (state.weighted / hopper.spread(state.total, state.weighted.shape)).astype(q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, refs.out.at[tile.head, pl.ds(tile.place * LINES + warpgroup * TILE, TILE)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(scratch.q_free.at[warpgroup])
    return used + tile.end - tile.begin


def _take_turns(scratch: Scratch) -> None:
    """Let the other consumer have the tensor cores."""
    plgpu.barrier_arrive(scratch.turn)
    plgpu.barrier_wait(scratch.turn)


def _absorb(plan: Plan, scratch: Scratch, tile: Tile, first: Any, used: Any, block: Any, state: hopper.State, *, masked: bool) -> Any:
    """One block of keys enters the softmax of a warpgroup whose first token is at position `first`."""
    warpgroup = lax.axis_index("wg")
    q, slot, at = scratch.q.at[warpgroup], lax.rem(used + block - tile.begin, jnp.int32(plan.stages)), block * plan.keys
    plgpu.barrier_wait(scratch.k_full.at[slot])
    scores = hopper.products(q, scratch.k.at[slot], lambda: _take_turns(scratch))
    plgpu.barrier_arrive(scratch.k_free.at[slot])
    scores, factor = hopper.shape_scores(scores, plan.spec)
    if masked:
        scores = jnp.where(_seen(plan, tile, first, at), scores, -jnp.inf)
    share, decay, state = hopper.weights(state, scores, factor)
    # what follows may not be moved before the softmax: it is the other consumer's turn to multiply
    share, decay, state = lax.optimization_barrier((share.astype(q.dtype), decay, state))
    plgpu.barrier_arrive(scratch.turn)
    plgpu.barrier_wait(scratch.v_full.at[slot])
    plgpu.barrier_wait(scratch.turn)
    values = scratch.v.at[slot]
    if masked:
        floor = None if plan.spec.window is None else tile.first - (plan.spec.window - 1)
        hopper.clear(values, at, floor, tile.stop)
    weighted = state.weighted * hopper.spread(decay, state.weighted.shape)
    weighted = hopper.weigh(weighted, share, values, None if scratch.spill is None else scratch.spill.at[warpgroup])
    plgpu.barrier_arrive(scratch.v_free.at[slot])
    return state._replace(weighted=weighted)


def _seen(plan: Plan, tile: Tile, first: Any, at: Any) -> Any:
    """Which keys of the block from key `at` on each line sees."""
    shape = (TILE, plan.keys)
    key, line = hopper.index(shape, 1, at), hopper.index(shape, 0, 0)
    power = plan.group & (plan.group - 1) == 0
    query = first + (line >> (plan.group.bit_length() - 1) if power else lax.div(line, jnp.full_like(line, plan.group)))
    seen = (key <= query) & (key < tile.stop)
    return seen if plan.spec.window is None else seen & (key > query - plan.spec.window)
