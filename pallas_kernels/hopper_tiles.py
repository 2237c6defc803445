"""Tiles of queries over the blocks of keys that they see, for Hopper: the prefill of paged and of contiguous attention.

A tile has 2 x 64 lines, one for each query of some heads that share a kv head: two warpgroups' consecutive tokens. Blocks of threads
stay for the whole kernel and take (tile, head) pairs in turn, head by head, each time from the caller's last tile to the first: those
that run at the same time then read the same keys, and what is taken last is short. A third warpgroup copies keys and values, and where
memory allows the next tile's queries while this one's are in use. The two take turns on the tensor cores, so that one's softmax runs
while the other multiplies (FlashAttention-3, arXiv 2407.08608); blocks of keys that all queries of a warpgroup see need no mask. Keys and
values in 8-bit codes go through a fourth warpgroup, a converter, on their way. A query's result depends on its row alone, bit for bit.
Where queries, keys and values lie in memory is the caller's: `hopper_places` says how they say it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import hopper, hopper_codes
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.hopper import COLUMNS, LOG2E, ROWS, TILE
from pallas_kernels.hopper_places import Keys, Queries, Tile

CONSUMERS = 2  # warpgroups that attend
PRODUCER, CONVERTER = 40, 72  # registers of a thread of the others
LINES = CONSUMERS * TILE  # of a tile of queries
TILE_FIELDS = ("place", "row", "first position", "tokens", "stop")  # the integers of a tile; stop: keys of the row


class Plan(NamedTuple):
    """Static shape: `heads` per tile's tokens are taken one by one; blocks of `keys` keys, `stages` of them at once in shared memory.

    codes: dtype of 8-bit keys and values, of which there are `raw_stages` blocks before they are converted.
    """

    spec: AttentionSpec
    queries: Queries
    source: Keys
    heads: int
    keys: int
    stages: int
    blocks: int  # of threads
    codes: Any = None
    raw_stages: int = 0

    @property
    def registers(self) -> int:
        """Of a consumer's thread."""
        return 232 if self.codes is None else 200

    def slots(self, head_dim: int) -> int:
        """Tiles whose queries are in shared memory at once."""
        if self.codes is not None:
            return 1
        return 2 if shared_bytes(head_dim, self.keys, self.stages, slots=2) <= hopper.SHARED_BYTES else 1


class Inputs(NamedTuple):
    """The kernel's arrays: `total` tiles are real, each TILE_FIELDS; results of the others' places are left as they are.

    kv: what `source` finds blocks in; with codes their scales stand last and lie like the codes. sinks: the score of each line of a
    warpgroup's queries. query_ids and key_ids: segment ids of each tile's lines and each row's
    keys, whole blocks of them.
    """

    q: Float[Array, "..."]
    kv: tuple[Array, ...]
    tiles: Int32[Array, "tiles_5"]
    total: Int32[Array, "1"]
    sinks: Float[Array, "heads tile"] | None = None
    query_ids: Int32[Array, "tiles lines"] | None = None
    key_ids: Int32[Array, "rows keys"] | None = None


class Scratch(NamedTuple):
    """Shared memory and barriers: queries once per slot and consumer, keys and values once per stage."""

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
    ids: Any = None
    spill: Any = None
    scales: Any = None
    raw: Any = None


class Raw(NamedTuple):
    """Shared memory and barriers of codes on their way: once per raw stage; scales: of keys, then of values, with the keys."""

    k: Any
    v: Any
    scales: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any


class Kernel(NamedTuple):
    """What every part of the kernel is given; refs: those of `Inputs`."""

    plan: Plan
    refs: Any
    out: Any
    scratch: Scratch


class Own(NamedTuple):
    """One warpgroup's queries of a tile, its first token's position and its lines' segment ids, if there are any."""

    q: Any
    first: Any
    ids: Any = None


def shared_bytes(head_dim: int, keys: int, stages: int, *, slots: int = 1, codes: bool = False) -> int:
    """Shared memory of a block of threads, for 16-bit data, with the queries of `slots` tiles at once; for codes with one raw stage."""
    plain = 2 * head_dim * (slots * LINES + 2 * stages * keys) + 4 * stages * keys + 8 * (2 * slots * CONSUMERS + 4 * stages + 1)
    return plain + (2048 + 8 * keys * (stages + 1) + _raw_bytes(head_dim, keys) if codes else 0)  # 2048: alignment


def raw_stages(head_dim: int, keys: int, stages: int) -> int:
    """Blocks of codes that find room beside the rest, at least one, at most three."""
    more = (hopper.SHARED_BYTES - shared_bytes(head_dim, keys, stages, codes=True)) // _raw_bytes(head_dim, keys)
    return min(max(1 + more, 1), 3)


def _raw_bytes(head_dim: int, keys: int) -> int:
    return 2 * keys * (head_dim + 4) + 32


def attend(inputs: Inputs, *, head_dim: int, plan: Plan) -> Float[Array, "..."]:
    """Attention of the tiles, in q's shape."""
    given, tree = jax.tree.flatten(inputs._replace(sinks=None if inputs.sinks is None else inputs.sinks.astype(jnp.float32) * LOG2E))
    scratch, made = jax.tree.flatten(_scratch(plan, head_dim, inputs.q.dtype, has_ids=inputs.key_ids is not None))

    def body(*refs: Any) -> None:
        *arrays, out, own = refs
        _body(Kernel(plan, jax.tree.unflatten(tree, arrays), out, jax.tree.unflatten(made, own)))

    return hopper.kernel(
        body,
        tuple(scratch),
        out_type=jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype),
        grid={"block": plan.blocks},
        registers=[plan.registers] * CONSUMERS + [PRODUCER] + ([] if plan.codes is None else [CONVERTER]),
    )(*given)


def _scratch(plan: Plan, head_dim: int, dtype: Any, *, has_ids: bool) -> Scratch:
    pieces, queries, plain = plan.source.copies(plan.keys), (plan.slots(head_dim), CONSUMERS), plan.codes is None

    def blocks(stages: int, dtype: Any) -> Any:
        return hopper.swizzled((stages, plan.keys, head_dim), dtype)

    def barriers(count: Any, arrivals: int = 1) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    found = Scratch(
        q=hopper.swizzled((*queries, TILE, head_dim), dtype),
        k=blocks(plan.stages, dtype),
        v=blocks(plan.stages, dtype),
        q_full=barriers(queries, plan.queries.copies),
        q_free=barriers(queries),
        k_full=barriers(plan.stages, pieces + has_ids if plain else 1),
        v_full=barriers(plan.stages, pieces if plain else 1),
        k_free=barriers(plan.stages, CONSUMERS),
        v_free=barriers(plan.stages, CONSUMERS),
        turn=plgpu.Barrier(num_arrivals=CONSUMERS),
        ids=plgpu.SMEM((plan.stages, plan.keys), jnp.int32) if has_ids else None,
        spill=next(iter(hopper.spill(CONSUMERS, plan.keys, dtype)), None),
    )
    if plain:
        return found
    raw = plan.raw_stages
    codes = Raw(
        k=blocks(raw, plan.codes),
        v=blocks(raw, plan.codes),
        scales=plgpu.SMEM((raw, 2 * plan.keys), jnp.float32),
        k_full=barriers(raw, 3 * pieces),
        v_full=barriers(raw, pieces),
        k_free=barriers(raw),
        v_free=barriers(raw),
    )
    return found._replace(scales=plgpu.SMEM((plan.stages + 1, 2 * plan.keys), jnp.float32), raw=codes)


def _body(kernel: Kernel) -> None:
    plan, refs, scratch = kernel.plan, kernel.refs, kernel.scratch
    warpgroup, number = lax.axis_index("wg"), lax.axis_index("block")
    mine = lax.div(refs.total[0] * plan.heads - number + (plan.blocks - 1), jnp.int32(plan.blocks))

    def tile(turn: Any) -> Tile:
        work = number + turn * plan.blocks
        head, index = lax.div(work, refs.total[0]), refs.total[0] - 1 - lax.rem(work, refs.total[0])
        place, row, first, tokens, stop = (refs.tiles[index * len(TILE_FIELDS) + field] for field in range(len(TILE_FIELDS)))
        floor = jnp.int32(0) if plan.spec.window is None else jnp.maximum(first - (plan.spec.window - 1), 0)
        begin = lax.div(floor, jnp.int32(plan.keys))
        end = lax.div(jnp.minimum(first + tokens, stop) + (plan.keys - 1), jnp.int32(plan.keys))
        return Tile(index, place, head, row, first, begin, jnp.maximum(begin, end), stop)

    @pl.when(warpgroup < CONSUMERS)
    def _consumer() -> None:
        plgpu.set_max_registers(plan.registers, action="increase")
        lax.fori_loop(0, mine, lambda turn, used: _consume(kernel, tile(turn), turn, used), jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == CONSUMERS)
    def _producer() -> None:
        plgpu.set_max_registers(PRODUCER, action="decrease")
        used = lax.fori_loop(0, mine, lambda turn, used: _produce(kernel, tile(turn), turn, used), jnp.int32(0))

        for consumer in range(CONSUMERS):
            hopper.drain(lambda slot, consumer=consumer: scratch.q_free.at[slot, consumer], mine, scratch.q.shape[0])
        ring, stages = _ring(kernel)
        for free in (ring.k_free, ring.v_free):
            hopper.drain(lambda slot, free=free: free.at[slot], used, stages)

    if plan.codes is not None:

        @pl.when(warpgroup == CONSUMERS + 1)
        def _converter() -> None:
            plgpu.set_max_registers(CONVERTER, action="decrease")
            used = lax.fori_loop(0, mine, lambda turn, used: used + tile(turn).end - tile(turn).begin, jnp.int32(0))
            lax.fori_loop(0, used, lambda number, _: _convert(kernel, number), None)
            for free in (scratch.k_free, scratch.v_free):
                hopper.drain(lambda slot, free=free: free.at[slot], used, plan.stages)


def _ring(kernel: Kernel) -> tuple[Any, int]:
    """Where the producer copies blocks to, and how many there are."""
    plan, scratch = kernel.plan, kernel.scratch
    return (scratch, plan.stages) if plan.codes is None else (scratch.raw, plan.raw_stages)


def _produce(kernel: Kernel, tile: Tile, turn: Any, used: Any) -> Any:
    """Copy a tile's queries and its blocks; `used` counts the blocks so far."""
    plan, refs, scratch = kernel.plan, kernel.refs, kernel.scratch
    slots = scratch.q.shape[0]
    at = lax.rem(turn, jnp.int32(slots))
    for consumer in range(CONSUMERS):
        pl.when(turn >= slots)(lambda consumer=consumer: plgpu.barrier_wait(scratch.q_free.at[at, consumer]))
        plan.queries.load(refs.q, tile, consumer, scratch.q.at[at, consumer], scratch.q_full.at[at, consumer])

    ring, stages = _ring(kernel)

    def copy(block: Any, _: None) -> None:
        number = used + block - tile.begin
        slot = lax.rem(number, jnp.int32(stages))
        at = plan.source.find(refs.kv, tile, block, plan.keys)
        for which, into, full, free in ((0, ring.k, ring.k_full, ring.k_free), (1, ring.v, ring.v_full, ring.v_free)):
            pl.when(number >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            plan.source.copy(refs.kv, at, which, into.at[slot], full.at[slot])
            if which == 0 and refs.key_ids is not None:
                ids = refs.key_ids.at[tile.row, pl.ds(pl.multiple_of(block * plan.keys, plan.keys), plan.keys)]
                plgpu.copy_gmem_to_smem(ids, scratch.ids.at[slot], full.at[slot])
            if which == 0 and plan.codes is not None:
                for half in range(2):
                    scales = ring.scales.at[slot].at[pl.ds(half * plan.keys, plan.keys)]
                    plan.source.copy(refs.kv[-1:], at, half, scales, full.at[slot])

    lax.fori_loop(tile.begin, tile.end, copy, None)
    return used + tile.end - tile.begin


def _convert(kernel: Kernel, number: Any) -> None:
    """A block of codes becomes tiles that the consumers take, keys first; their scales come with the keys and are kept for the values."""
    plan, scratch = kernel.plan, kernel.scratch
    raw, slot, into = scratch.raw, lax.rem(number, jnp.int32(plan.raw_stages)), lax.rem(number, jnp.int32(plan.stages))
    for which, codes, tile in ((0, raw.k, scratch.k), (1, raw.v, scratch.v)):
        full, free = (raw.v_full, scratch.v_free) if which else (raw.k_full, scratch.k_free)
        plgpu.barrier_wait(full.at[slot])
        pl.when(number >= plan.stages)(lambda free=free: plgpu.barrier_wait(free.at[into]))
        hopper_codes.unpack(codes.at[slot], tile.at[into])
        if which == 0:
            hopper_codes.move(raw.scales.at[slot], scratch.scales.at[lax.rem(number, jnp.int32(plan.stages + 1))])
        plgpu.commit_smem()
        plgpu.barrier_arrive((scratch.v_full if which else scratch.k_full).at[into])
        plgpu.barrier_arrive((raw.v_free if which else raw.k_free).at[slot])


def _consume(kernel: Kernel, tile: Tile, turn: Any, used: Any) -> Any:
    """Attend with one warpgroup's queries of a tile and write the result; `used` counts the blocks so far."""
    (plan, refs, out, scratch), warpgroup = kernel, lax.axis_index("wg")
    at = lax.rem(turn, jnp.int32(scratch.q.shape[0]))
    own = Own(scratch.q.at[at, warpgroup], tile.first + warpgroup * plan.queries.tokens)
    state = hopper.start(own.q.shape[1])
    if refs.sinks is not None:
        sinks = hopper.load(refs.sinks.at[tile.head], ROWS, coalesced=False)
        state = state._replace(top=sinks, total=state.total + 1)
    if refs.query_ids is not None:
        own = own._replace(ids=hopper.load(refs.query_ids.at[tile.number, pl.ds(warpgroup * TILE, TILE)], ROWS, coalesced=False))
    plgpu.barrier_wait(scratch.q_full.at[at, warpgroup])
    pl.when(warpgroup == 1)(lambda: _take_turns(scratch))
    absorb = partial(_absorb, kernel, tile, own, used)
    for begin, end, masked in _ranges(plan, tile, own.first, has_ids=own.ids is not None):
        state = lax.fori_loop(begin, end, partial(absorb, masked=masked), state)
    pl.when(warpgroup == 0)(lambda: _take_turns(scratch))
    total = jnp.where(state.total > 0, state.total, jnp.ones_like(state.total))
    own.q[...] = (state.weighted / hopper.spread(total, state.weighted.shape)).astype(own.q.dtype)
    plgpu.commit_smem()
    plan.queries.store(own.q, tile, warpgroup, out)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(scratch.q_free.at[at, warpgroup])
    return used + tile.end - tile.begin


def _ranges(plan: Plan, tile: Tile, first: Any, *, has_ids: bool) -> list[tuple[Any, Any, bool]]:
    """A tile's blocks, as (begin, end, masked): those in the middle need no mask for a warpgroup whose first token is at `first`."""
    if has_ids:
        return [(tile.begin, tile.end, True)]
    ranges, inside = [], tile.begin
    if plan.spec.window is not None:  # blocks before it begin before the last query's window
        inside = lax.div(jnp.maximum(first + plan.queries.tokens - plan.spec.window, 0) + (plan.keys - 1), jnp.int32(plan.keys))
        inside = jnp.clip(inside, tile.begin, tile.end)
        ranges.append((tile.begin, inside, True))
    whole = lax.div(jnp.minimum(first + 1, tile.stop), jnp.int32(plan.keys))  # blocks before it end before the first query
    whole = jnp.clip(whole, inside, tile.end)
    return [*ranges, (inside, whole, False), (whole, tile.end, True)]


def _take_turns(scratch: Scratch) -> None:
    """Let the other consumer have the tensor cores."""
    plgpu.barrier_arrive(scratch.turn)
    plgpu.barrier_wait(scratch.turn)


def _absorb(kernel: Kernel, tile: Tile, own: Own, used: Any, block: Any, state: hopper.State, *, masked: bool) -> Any:
    """One block of keys enters the softmax of a warpgroup."""
    plan, scratch, warpgroup = kernel.plan, kernel.scratch, lax.axis_index("wg")
    slot, at = lax.rem(used + block - tile.begin, jnp.int32(plan.stages)), block * plan.keys
    plgpu.barrier_wait(scratch.k_full.at[slot])
    scores = hopper.products(own.q, scratch.k.at[slot], lambda: _take_turns(scratch))
    scales = None
    if plan.codes is not None:
        scales = scratch.scales.at[lax.rem(used + block - tile.begin, jnp.int32(plan.stages + 1))]
        scores = scores * hopper_codes.columns(scales.at[pl.ds(0, plan.keys)], scores.shape)
    same = None
    if own.ids is not None:
        ids = hopper.load(scratch.ids.at[slot], COLUMNS, coalesced=False)
        same = hopper.spread(own.ids, scores.shape) == lax.broadcast_in_dim(ids, scores.shape, [1])
    plgpu.barrier_arrive(scratch.k_free.at[slot])
    scores, factor = hopper.shape_scores(scores, plan.spec)
    seen = None
    if masked:
        seen = _seen(plan, tile, own.first, at)
        seen = seen if same is None else seen & same
        scores = jnp.where(seen, scores, -jnp.inf)
    share, decay, state = hopper.weights(state, scores, factor)
    if scales is not None:
        share = share * hopper_codes.columns(scales.at[pl.ds(plan.keys, plan.keys)], share.shape)
        share = share if seen is None else jnp.where(seen, share, jnp.zeros_like(share))
    # what follows may not be moved before the softmax: it is the other consumer's turn to multiply
    share, decay, state = lax.optimization_barrier((share.astype(own.q.dtype), decay, state))
    plgpu.barrier_arrive(scratch.turn)
    plgpu.barrier_wait(scratch.v_full.at[slot])
    plgpu.barrier_wait(scratch.turn)
    values = scratch.v.at[slot]
    if masked and plan.codes != jnp.int8:  # 0 times an integer is 0
        floor = None if plan.spec.window is None else tile.first - (plan.spec.window - 1)
        hopper.clear(values, at, floor, tile.stop)
    weighted = state.weighted * hopper.spread(decay, state.weighted.shape)
    weighted = hopper.weigh(weighted, share, values, None if scratch.spill is None else scratch.spill.at[warpgroup])
    plgpu.barrier_arrive(scratch.v_free.at[slot])
    return state._replace(weighted=weighted)


def _seen(plan: Plan, tile: Tile, first: Any, at: Any) -> Any:
    """Which keys of the block from key `at` on each line sees."""
    shape = (TILE, plan.keys)
    key, query = hopper.index(shape, 1, at), first + plan.queries.token(hopper.index(shape, 0, 0))
    seen = (key <= query) & (key < tile.stop)
    return seen if plan.spec.window is None else seen & (key > query - plan.spec.window)
