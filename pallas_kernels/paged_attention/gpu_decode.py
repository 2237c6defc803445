"""One query per row over its pages, for Hopper: flash decoding, cut over keys so that a few long rows fill the GPU too.

A row's keys are cut into chunks; an item is a chunk of a row. Blocks of threads stay for the whole kernel and take (item, kv head)
pairs in turn. Each has `streams` pairs of warpgroups: a producer copies blocks of keys and values, a consumer attends with the kv
head's whole group of queries and leaves the chunk's normalised output and the logarithm of its sum, which `gpu_combine` merges.
Sources: FlashAttention-2 (arXiv 2307.08691), Flash-Decoding (Dao et al., 2023), PagedAttention (arXiv 2309.06180).
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
from pallas_kernels.hopper import TILE
from pallas_kernels.paged_attention.gpu_pages import Pages

KEYS = 64  # of a block
ITEM = ("row", "chunk", "first block", "blocks", "stop")  # the integers of an item; stop: keys of the row


class Plan(NamedTuple):
    """Static shape of a decode. A row has at most max_chunks chunks; queries of a kv head are padded to `padded`."""

    spec: AttentionSpec
    pages: Pages
    max_chunks: int
    padded: int
    stages: int
    streams: int
    blocks: int  # of threads

    @property
    def together(self) -> bool:
        """Whether keys and values of a block lie together, so that one copy brings both."""
        return self.pages.page_size == KEYS


class Refs(NamedTuple):
    """The kernel's arrays."""

    q: Any
    kv: Any
    tables: Any
    items: Any
    count: Any
    out: Any
    sums: Any


class Scratch(NamedTuple):
    """Shared memory and barriers, each once per stream."""

    q: Any
    kv: Any
    sums: Any
    q_full: Any
    q_free: Any
    full: Any
    free: Any
    spill: Any = None


class Item(NamedTuple):
    """A chunk of a row for one kv head; slot is where its result goes."""

    slot: Any
    head: Any
    row: Any
    first: Any
    blocks: Any
    stop: Any


def streams(head_dim: int) -> int:
    """Pairs of warpgroups in a block of threads: two where registers and shared memory suffice."""
    return 2 if head_dim <= 128 else 1


def shared_bytes(head_dim: int, stages: int) -> int:
    """Shared memory of a block of threads, for 16-bit data."""
    return streams(head_dim) * (2 * head_dim * (TILE + stages * 2 * KEYS) + 4 * TILE + 16 * (stages + 1)) + hopper.REDUCTION_BYTES


def decode(
    q: Float[Array, "kv_heads lines head_dim"],
    kv: Float[Array, "pool_rows head_dim"],
    tables: Int32[Array, "rows_width"],
    items: Int32[Array, "items_5"],
    count: Int32[Array, "1"],
    *,
    rows: int,
    plan: Plan,
) -> tuple[Float[Array, "slots padded head_dim"], Float[Array, "slots padded"]]:
    """Output of each item, normalised, and the base 2 logarithm of the sum of its weights.

    q: `padded` lines for each of the rows, more may follow. slots are rows x max_chunks x kv_heads; those without an item hold anything.
    items: ITEM for each, the first `count` are real.
    """
    head_dim, dtype = q.shape[2], q.dtype
    slots = rows * plan.max_chunks * plan.pages.kv_heads
    arrivals = 1 if plan.together else 2 * plan.pages.pieces(KEYS)
    scratch = (
        hopper.swizzled((plan.streams, TILE, head_dim), dtype),
        hopper.swizzled((plan.streams, plan.stages, 2 * KEYS, head_dim), dtype),
        plgpu.SMEM((plan.streams, TILE), jnp.float32),
        plgpu.Barrier(num_barriers=plan.streams),
        plgpu.Barrier(num_barriers=plan.streams),
        plgpu.Barrier(num_arrivals=arrivals, num_barriers=(plan.streams, plan.stages)),
        plgpu.Barrier(num_barriers=(plan.streams, plan.stages)),
        *hopper.spill(plan.streams, KEYS, dtype),
    )
    return hopper.kernel(
        lambda *refs: _body(plan, Refs(*refs[:-1]), Scratch(*refs[-1])),
        scratch,
        out_type=(
            jax.ShapeDtypeStruct((slots, plan.padded, head_dim), dtype),
            jax.ShapeDtypeStruct((slots, plan.padded), jnp.float32),
        ),
        grid={"block": plan.blocks},
        warpgroups=2 * plan.streams,
    )(q, kv, tables, items, count)


def _body(plan: Plan, refs: Refs, scratch: Scratch) -> None:
    warpgroup = lax.axis_index("wg")
    stream = lax.rem(warpgroup, jnp.int32(plan.streams))
    number, of = stream * plan.blocks + lax.axis_index("block"), plan.blocks * plan.streams  # every block gets work before any gets two
    mine = lax.div(refs.count[0] * plan.pages.kv_heads - number + (of - 1), jnp.int32(of))

    def item(turn: Any) -> Item:
        work = number + turn * of
        head, index = lax.rem(work, jnp.int32(plan.pages.kv_heads)), lax.div(work, jnp.int32(plan.pages.kv_heads))
        row, chunk, first, blocks, stop = (refs.items[index * len(ITEM) + field] for field in range(len(ITEM)))
        return Item((row * plan.max_chunks + chunk) * plan.pages.kv_heads + head, head, row, first, blocks, stop)

    @pl.when(warpgroup < plan.streams)
    def _consumer() -> None:
        plgpu.set_max_registers(208 if plan.streams == 2 else 232, action="increase")
        lax.fori_loop(0, mine, lambda turn, used: _consume(plan, refs, scratch, stream, item(turn), used), jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup >= plan.streams)
    def _producer() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def turn(turn: Any, used: Any) -> Any:
            pl.when(turn > 0)(lambda: plgpu.barrier_wait(scratch.q_free.at[stream]))
            return _produce(plan, refs, scratch, stream, item(turn), used)

        used = lax.fori_loop(0, mine, turn, jnp.int32(0))
        pl.when(mine > 0)(lambda: plgpu.barrier_wait(scratch.q_free.at[stream]))
        hopper.drain(lambda slot: scratch.free.at[stream, slot], used, plan.stages)


def _produce(plan: Plan, refs: Refs, scratch: Scratch, stream: Any, item: Item, used: Any) -> Any:
    """Copy an item's queries and its blocks; `used` counts the blocks that the stream has had."""
    pages = plan.pages
    plgpu.copy_gmem_to_smem(
        refs.q.at[item.head, pl.ds(pl.multiple_of(item.row * plan.padded, plan.padded), plan.padded)],
        scratch.q.at[stream].at[pl.ds(0, plan.padded)],
        scratch.q_full.at[stream],
    )

    def copy(number: Any, _: None) -> None:
        slot = lax.rem(used + number, jnp.int32(plan.stages))
        at = pages.at(refs.tables, item.row, item.head, item.first + number, KEYS)
        pl.when(used + number >= plan.stages)(lambda: plgpu.barrier_wait(scratch.free.at[stream, slot]))
        into, barrier = scratch.kv.at[stream].at[slot], scratch.full.at[stream, slot]
        if plan.together:
            plgpu.copy_gmem_to_smem(refs.kv.at[pl.ds(at[0], 2 * KEYS)], into, barrier)
            return
        for which in range(2):
            pages.copy(refs.kv, at, which, into.at[pl.ds(which * KEYS, KEYS)], barrier)

    lax.fori_loop(0, item.blocks, copy, None)
    return used + item.blocks


def _consume(plan: Plan, refs: Refs, scratch: Scratch, stream: Any, item: Item, used: Any) -> Any:
    """Attend to an item's blocks and write its result; `used` counts the blocks that the stream has had."""
    q, sums, spec = scratch.q.at[stream], scratch.sums.at[stream], plan.spec
    spilled = None if scratch.spill is None else scratch.spill.at[stream]
    floor = None if spec.window is None else item.stop - spec.window
    plgpu.barrier_wait(scratch.q_full.at[stream])

    def block(number: Any) -> tuple[Any, Any]:
        slot = lax.rem(used + number, jnp.int32(plan.stages))
        return slot, scratch.kv.at[stream].at[slot]

    def absorb(number: Any, state: hopper.State, *, last: bool) -> hopper.State:
        slot, both = block(number)
        keys, values = both.at[pl.ds(0, KEYS)], both.at[pl.ds(KEYS, KEYS)]
        plgpu.barrier_wait(scratch.full.at[stream, slot])
        scores, factor = hopper.shape_scores(hopper.products(q, keys), spec)
        if last:
            plgpu.barrier_arrive(scratch.q_free.at[stream])
        first = (item.first + number) * KEYS
        key = hopper.index((TILE, KEYS), 1, first)
        seen = key < item.stop
        if floor is not None:
            seen &= key >= floor
        share, decay, state = hopper.weights(state, jnp.where(seen, scores, -jnp.inf), factor)
        hopper.clear(values, first, floor, item.stop)
        weighted = state.weighted * hopper.spread(decay, state.weighted.shape)
        weighted = hopper.weigh(weighted, share.astype(q.dtype), values, spilled)
        if not last:
            plgpu.barrier_arrive(scratch.free.at[stream, slot])
        return state._replace(weighted=weighted)

    state = lax.fori_loop(0, item.blocks - 1, partial(absorb, last=False), hopper.start(q.shape[1]))
    state = absorb(item.blocks - 1, state, last=True)
    slot, both = block(item.blocks - 1)
    out = both.at[pl.ds(0, TILE)]  # the last block's keys have been used: the output leaves from their memory
    out[...] = (state.weighted / hopper.spread(state.total, state.weighted.shape)).astype(q.dtype)
    sums[...] = state.top + jnp.log2(state.total)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out.at[pl.ds(0, plan.padded)], refs.out.at[item.slot])
    plgpu.copy_smem_to_gmem(sums.at[pl.ds(0, plan.padded)], refs.sums.at[item.slot])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(scratch.free.at[stream, slot])
    return used + item.blocks
