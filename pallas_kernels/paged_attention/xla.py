"""Paged attention in plain XLA, for every platform: chunked over pages, decode rows and prefill rows apart.

The new keys and values are scattered into the donated pool. A decode row (one query) is cut into work items, one for each chunk of its
keys; the items of all rows stand in one list of which so many are taken at a time, and a row's partial results are combined in the
order of its chunks: the work follows the sum of the lengths. The tokens of prefill rows are cut into blocks that never span two rows,
and each block goes through the chunks it can see with a running softmax. Scores exist for the chunks at hand only. What a row may not
see is masked before and after the matmuls, so a row's result depends on the row alone, bit for bit. Knows no model and no mesh.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels import dispatch, tuning
from pallas_kernels.attention import (
    LOWEST,
    AttentionSpec,
    Running,
    absorb,
    accumulation_dtype,
    blank,
    finish,
    precision,
    shape_scores,
    start,
)
from pallas_kernels.paged_attention.api import PagedMetadata, PagedResult
from pallas_kernels.paged_attention.packing import by_row, by_token, ceil_div, cut, in_parts, keys_seen, page_size_of, take, tuning_key
from pallas_kernels.paged_attention.pool import Layout, Pool, QuantizedKV, by_head, dequantize, side_by_side, values_of

State = TypeVar("State")
MAX_CHUNKS = 32  # a row's partial results are kept for at most so many chunks; longer tables get longer chunks


def kv_layout(*, kv_heads: int, head_dim: int, dtype: Any, kv_dtype: str | None = None) -> Layout:
    """That of the platform's own kernels, whose place this implementation takes where they refuse."""
    make = side_by_side if dispatch.target().platform == "tpu" else by_head
    return make(kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, kv_dtype=kv_dtype)


class Sizes(NamedTuple):
    """Block sizes. Decode: keys of an item (a chunk of a row), chunks per row and keys in all taken at a time. Prefill: queries of a
    block, keys of a chunk, blocks taken at a time."""

    decode_keys: int
    decode_chunks_at_once: int
    decode_keys_at_once: int
    prefill_queries: int
    prefill_keys: int
    prefill_blocks_at_once: int


def heuristic(platform: str, key: dict[str, int | str]) -> dict[str, int]:
    """Sizes that were never measured: what stays in a CPU core's cache; on an accelerator few loop steps, each worth its launch."""
    token_bytes = int(key["kv_heads"]) * int(key["head_dim"]) * jnp.dtype(str(key["dtype"])).itemsize
    if platform == "cpu":
        return Sizes(128, 1, 2**18 // token_bytes, 32, 128, 1)._asdict()
    return Sizes(512, MAX_CHUNKS, 2**26 // token_bytes, 128, 512, 16)._asdict()


def candidates(platform: str, key: dict[str, int | str]) -> list[dict[str, int]]:
    """Sizes worth measuring."""
    base = Sizes(**heuristic(platform, key))
    grid = [base._replace(decode_keys=keys) for keys in (base.decode_keys // 2, base.decode_keys * 2)]
    grid += [base._replace(prefill_keys=keys) for keys in (base.prefill_keys // 2, base.prefill_keys * 2)]
    grid += [base._replace(prefill_queries=queries) for queries in (base.prefill_queries // 2, base.prefill_queries * 2)]
    return [sizes._asdict() for sizes in (base, *grid)]


def paged_attention(  # noqa: PLR0913
    q: Float[Array, "tokens heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    positions: Int32[Array, "tokens"],
    kv: Pool,
    metadata: PagedMetadata,
    *,
    spec: AttentionSpec,
    rope: Float[Array, "half_rotary"] | None,
    sinks: Float[Array, "heads"] | None,
) -> PagedResult:
    """See api.paged_attention."""
    kv_heads, heads = k.shape[1], q.shape[1]
    sizes = Sizes(**tuning.sizes("paged_attention", "xla", dispatch.target(), tuning_key(kv, q)))
    sinks = None if sinks is None else sinks.reshape(kv_heads, heads // kv_heads)
    parts = partial(_decode, spec=spec, sinks=sinks, sizes=sizes), partial(_prefill, spec=spec, sinks=sinks, sizes=sizes)
    return in_parts(q, k, v, positions, kv, metadata, spec=spec, rope=rope, parts=parts)


def _gather(
    kv: Pool, pages: Int32[Array, "items pages_of_chunk"], which: int, seen: Bool[Array, "items keys"] | None, like: Float[Array, "..."]
) -> Float[Array, "items kv_heads keys head_dim"]:
    """Keys (which=0) or values (1) of each item's pages, contiguous per kv head; 0 where not seen, since 0 * NaN is NaN. like: queries."""
    items, count = pages.shape
    values, kv_heads, page_size, head_dim = values_of(kv), values_of(kv).shape[1], page_size_of(kv), like.shape[-1]
    head, shape, by_head = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None], (items, kv_heads, count * page_size), values.ndim == 5
    at = pages[:, None] * kv_heads + head  # as rows of a matrix: XLA on CPUs copies whole rows, but gathers boxes by element
    both, at = (at, at * 2 + which) if by_head else (at, at)
    found = take(values.reshape(-1, page_size * (head_dim if by_head else values.shape[3])), at.reshape(-1)).reshape(*shape, -1)
    out = found if by_head else found[..., which * head_dim : (which + 1) * head_dim]
    if isinstance(kv, QuantizedKV):
        scales = take(kv.scales.reshape(-1, page_size), (2 * both + which).reshape(-1)).reshape(shape)
        out = dequantize(QuantizedKV(out, scales), like.dtype)
    return out if seen is None else jnp.where(seen[:, None, :, None], out, 0)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(number - 1, 0).bit_length()


def _chunked(
    tables: Int32[Array, "rows pages_per_row"], keys: int, page_size: int, *, bounded: bool
) -> Int32[Array, "rows chunks pages_of_chunk"]:
    """Page tables cut into chunks of about so many keys (never more pages than the table has); the guard page fills the last."""
    rows, width = tables.shape
    pages = max(keys // page_size, -(-width // MAX_CHUNKS) if bounded else 1, 1)
    pages = min(pages, width)
    return jnp.pad(tables, ((0, 0), (0, -width % pages))).reshape(rows, -1, pages)


def _decode(
    q: Float[Array, "tokens kv_heads group head_dim"],
    positions: Int32[Array, "tokens"],
    kv: Pool,
    metadata: PagedMetadata,
    *,
    spec: AttentionSpec,
    sinks: Float[Array, "kv_heads group"] | None,
    sizes: Sizes,
) -> Float[Array, "tokens kv_heads group head_dim"]:
    """A few queries per row. Items (row, chunk) in row order go through the matmuls some at a time; then each row combines its own."""
    shape, rows, tokens, page_size = q.shape, metadata.decode_rows, metadata.decode_tokens, page_size_of(kv)
    q = by_row(q, rows)
    sinks = None if sinks is None else jnp.tile(sinks, (1, tokens))
    tables = _chunked(metadata.page_tables[:rows], sizes.decode_keys, page_size, bounded=True)
    chunks, keys = tables.shape[1], tables.shape[2] * page_size
    stops, stop = keys_seen(positions, metadata)
    floors = jnp.zeros_like(stops) if spec.window is None else jnp.maximum(stops - spec.window, 0)
    first = lax.div(floors[:, 0], jnp.int32(keys))
    counts = ceil_div(stop, keys) - first
    ends = jnp.cumsum(counts)
    begins = ends - counts

    at_once = min(max(sizes.decode_keys_at_once // keys, 1), rows * min(chunks, sizes.decode_chunks_at_once))
    groups = -(-rows * chunks // at_once)
    item = jnp.arange(groups * at_once, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None] <= item[:, None], axis=1, dtype=jnp.int32), rows - 1)
    chunk = jnp.clip(item - take(begins, row) + take(first, row), 0, chunks - 1)
    pages, offset = take(tables, row, chunk), chunk * keys

    def attend(group: Int32[Array, ""], state: Running) -> Running:
        def own(x: Int32[Array, "items ..."]) -> Int32[Array, "items_at_once ..."]:
            return lax.dynamic_slice_in_dim(x, group * at_once, at_once)

        index = (own(offset)[:, None] + jnp.arange(keys, dtype=jnp.int32)[None])[:, None]
        mine = own(row)
        seen = (index < take(stops, mine)[..., None]) & (index >= take(floors, mine)[..., None])
        part = _attend_once(take(q, mine), kv, own(pages), seen, spec)
        return jax.tree.map(lambda whole, x: lax.dynamic_update_slice_in_dim(whole, x, group * at_once, 0), state, part)

    wide = accumulation_dtype(q.dtype)
    zeros = blank(q, (groups * at_once, *q.shape[1:]), wide)
    state = Running(zeros[..., 0], zeros[..., 0], zeros)
    state = _loop(attend, state, jnp.zeros((), jnp.int32), ceil_div(ends[-1], at_once), groups)
    out = by_token(_combine(state, begins, counts, chunks, sinks).astype(q.dtype), shape)
    return out if tokens == 1 else jnp.where((positions >= 0)[:, None, None, None], out, 0)


def _attend_once(
    q: Float[Array, "items kv_heads lines head_dim"],
    kv: Pool,
    pages: Int32[Array, "items pages_of_chunk"],
    seen: Bool[Array, "items tokens keys"],
    spec: AttentionSpec,
) -> Running:
    """A few queries over one chunk of keys, for each item: what their softmax would start with."""
    wide, exact, known = accumulation_dtype(q.dtype), precision(q.dtype), jnp.any(seen, axis=1)
    keys = _gather(kv, pages, 0, None, q)
    scores = jnp.einsum("iksh,ikgh->iksg", keys, q, precision=exact, preferred_element_type=wide).swapaxes(2, 3)
    seen = (seen if seen.shape[1] == 1 else jnp.repeat(seen, q.shape[2] // seen.shape[1], axis=1))[:, None]
    scores = jnp.where(seen, shape_scores(scores, spec), LOWEST)
    top = jnp.max(scores, axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0)
    values = _gather(kv, pages, 1, known, q)
    weighted = jnp.einsum("ikgs,iksh->ikgh", weights.astype(values.dtype), values, precision=exact, preferred_element_type=wide)
    return Running(top, jnp.sum(weights, axis=-1), weighted)


def _combine(
    state: Running,
    begins: Int32[Array, "rows"],
    counts: Int32[Array, "rows"],
    chunks: int,
    sinks: Float[Array, "kv_heads group"] | None,
) -> Float[Array, "rows kv_heads group head_dim"]:
    """The rows' softmax from their items' partial ones, in the order of the chunks; 0 for a row without any."""
    chunk = jnp.arange(chunks, dtype=jnp.int32)[None]
    item = jnp.minimum(begins[:, None] + chunk, state.top.shape[0] - 1)
    has = (chunk < counts[:, None])[..., None, None]
    tops = jnp.where(has, take(state.top, item), LOWEST)
    top = jnp.max(tops, axis=1)
    if sinks is not None:
        top = jnp.maximum(top, sinks.astype(top.dtype)[None])
    share = jnp.where(has, jnp.exp(tops - top[:, None]), 0)
    totals = jnp.where(has, take(state.total, item), 0)  # where, not times 0: a neighbour's item may hold infinities
    weighted = jnp.where(has[..., None], take(state.weighted, item), 0)
    total = jnp.zeros_like(top) if sinks is None else jnp.exp(sinks.astype(top.dtype)[None] - top)
    mean = jnp.zeros_like(weighted[:, 0])
    for index in range(chunks):  # unrolled: a fixed order, and one fusion where a reduction would wake XLA's thread pool
        total = total + totals[:, index] * share[:, index]
        mean = mean + weighted[:, index] * share[:, index, ..., None]
    return jnp.where((counts > 0)[:, None, None, None], finish(Running(top, total, mean)), 0)


def _loop(
    step: Callable[[Int32[Array, ""], State], State], state: State, first: Int32[Array, ""], stop: Int32[Array, ""], most: int
) -> State:
    """step for every index in [first, stop); no loop when there can be only one."""
    return step(jnp.zeros((), jnp.int32), state) if most == 1 else lax.fori_loop(first, stop, step, state)


def _prefill(
    q: Float[Array, "tokens kv_heads group head_dim"],
    positions: Int32[Array, "tokens"],
    kv: Pool,
    metadata: PagedMetadata,
    *,
    spec: AttentionSpec,
    sinks: Float[Array, "kv_heads group"] | None,
    sizes: Sizes,
) -> Float[Array, "tokens kv_heads group head_dim"]:
    """Blocks of queries of one row each, some at a time and as many as there really are, each through the chunks it sees."""
    tokens, kv_heads, group, head_dim = q.shape
    typical = tokens // (metadata.query_lengths.shape[0] - metadata.decode_rows)  # many short rows want small blocks
    queries = min(sizes.prefill_queries, tokens, max(_power_of_two(4 * typical), 16))
    at_once = min(sizes.prefill_blocks_at_once, -(-tokens // queries))
    blocks = cut(metadata, positions, queries, at_once)
    room = blocks.row.shape[0]
    queued = take(q, blocks.token).transpose(0, 2, 3, 1, 4)
    tables = _chunked(metadata.page_tables, sizes.prefill_keys, page_size_of(kv), bounded=False)

    def attend(
        index: Int32[Array, ""], out: Float[Array, "blocks kv_heads group queries head_dim"]
    ) -> Float[Array, "blocks kv_heads group queries head_dim"]:
        def own(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, index * at_once, at_once)

        rows = own(blocks.row)
        part = _attend_blocks(
            own(queued), own(blocks.position), kv, take(tables, rows), take(metadata.kv_lengths, rows), spec=spec, sinks=sinks
        )
        return lax.dynamic_update_slice_in_dim(out, part, index * at_once, 0)

    out = _loop(attend, blank(q, queued.shape, q.dtype), jnp.zeros((), jnp.int32), ceil_div(blocks.total, at_once), room // at_once)
    out = out.transpose(0, 3, 1, 2, 4).reshape(room * queries, kv_heads, group, head_dim)
    return jnp.where((positions >= 0)[:, None, None, None], take(out, blocks.place), 0)


def _attend_blocks(
    q: Float[Array, "blocks kv_heads group queries head_dim"],
    positions: Int32[Array, "blocks queries"],
    kv: Pool,
    tables: Int32[Array, "blocks chunks pages_of_chunk"],
    lengths: Int32[Array, "blocks"],
    *,
    spec: AttentionSpec,
    sinks: Float[Array, "kv_heads group"] | None,
) -> Float[Array, "blocks kv_heads group queries head_dim"]:
    """Blocks of queries through the chunks that any of them sees; position -1 sees nothing."""
    blocks, kv_heads, group, queries, head_dim = q.shape
    wide, exact, keys = accumulation_dtype(q.dtype), precision(q.dtype), tables.shape[2] * page_size_of(kv)
    stop = jnp.minimum(jnp.max(positions, axis=1) + 1, lengths)
    floor = jnp.zeros_like(stop)
    if spec.window is not None:
        lowest = jnp.min(jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max), axis=1)
        floor = jnp.clip(lowest - (spec.window - 1), 0, stop)
    flat = q.reshape(blocks, kv_heads, group * queries, head_dim)

    def step(chunk: Int32[Array, ""], state: Running) -> Running:
        pages = lax.dynamic_index_in_dim(tables, chunk, 1, keepdims=False)
        index = (chunk * keys + jnp.arange(keys, dtype=jnp.int32))[None]
        known = (index >= floor[:, None]) & (index < stop[:, None])
        seen = known[:, None] & (index[:, None] <= positions[..., None])
        if spec.window is not None:
            seen &= index[:, None] > positions[..., None] - spec.window
        values = _gather(kv, pages, 1, known, q)

        def weigh(weights: Float[Array, "blocks kv_heads group queries keys"]) -> Float[Array, "blocks kv_heads group queries head_dim"]:
            weights = weights.astype(values.dtype).reshape(blocks, kv_heads, group * queries, keys)
            return jnp.einsum("bkms,bksh->bkmh", weights, values, precision=exact, preferred_element_type=wide).reshape(q.shape)

        scores = jnp.einsum("bkmh,bksh->bkms", flat, _gather(kv, pages, 0, None, q), precision=exact, preferred_element_type=wide)
        return absorb(state, shape_scores(scores, spec).reshape(*q.shape[:4], keys), seen[:, None, None], weigh)

    state = start(q, None if sinks is None else sinks[None, ..., None])
    first = lax.div(jnp.min(jnp.where(stop > floor, floor, jnp.iinfo(jnp.int32).max)), jnp.int32(keys))
    return finish(_loop(step, state, first, ceil_div(jnp.max(stop), keys), tables.shape[1])).astype(q.dtype)
