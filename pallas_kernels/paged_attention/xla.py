"""Paged attention in plain XLA, for every platform: chunked over pages, decode rows and prefill rows apart.

The new keys and values are scattered into the donated pool. Decode rows (one query each) then go together through chunks of their
pages, as many chunks as the longest of them needs; the other rows' tokens are cut into query blocks that never span two rows, and one
block after the other goes through the chunks it can see. Scores exist for one chunk at a time. What a row may not see is masked before
and after the matmuls, so a row's result depends on nothing but the row.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.attention import AttentionSpec, Running, absorb, accumulation_dtype, finish, rotate, shape_scores, start
from pallas_kernels.paged_attention.api import KVLayout, PagedMetadata, PagedResult

DIMS = ("pages", "kv_heads", "kv", "page", "head_dim")
CHUNK_KEYS = 256
BLOCK_QUERIES = 64


def kv_layout(*, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> KVLayout:
    """A page holds, for each kv head, its tokens' keys and then its tokens' values."""
    return KVLayout(DIMS, kv_heads, head_dim, dtype)


def paged_attention(
    q: Float[Array, "tokens heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    positions: Int32[Array, "tokens"],
    kv: Float[Array, "pages kv_heads 2 page head_dim"],
    metadata: PagedMetadata,
    *,
    spec: AttentionSpec,
    rope: Float[Array, "half_rotary"] | None,
    sinks: Float[Array, "heads"] | None,
) -> PagedResult:
    """See api.paged_attention."""
    tokens, heads, head_dim = q.shape
    kv_heads, decode = k.shape[1], metadata.decode_rows
    if rope is not None:
        q, k = rotate(q, positions, rope, spec.rope_scale), rotate(k, positions, rope, spec.rope_scale)
    kv = write(kv, k, v, positions, metadata)
    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    sinks = None if sinks is None else sinks.reshape(kv_heads, heads // kv_heads)
    parts = []
    if decode:
        parts.append(_decode(grouped[:decode], positions[:decode], kv, metadata, spec=spec, sinks=sinks))
    if tokens > decode:
        parts.append(_prefill(grouped[decode:], positions[decode:], kv, metadata, spec=spec, sinks=sinks))
    out = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    return PagedResult(out.reshape(tokens, heads, head_dim), kv)


def row_of_token(metadata: PagedMetadata, tokens: int) -> Int32[Array, "tokens"]:
    """The row that owns each packed token; some row for padding tokens."""
    decode = metadata.decode_rows
    rows = jnp.arange(decode, dtype=jnp.int32)
    if tokens == decode:
        return rows
    index = jnp.arange(decode, tokens, dtype=jnp.int32)[:, None]
    starts, lengths = metadata.query_starts[None, decode:], metadata.query_lengths[None, decode:]
    owns = (index >= starts) & (index < starts + lengths)
    return jnp.concatenate([rows, decode + jnp.argmax(owns, axis=1).astype(jnp.int32)])


def write(
    kv: Float[Array, "pages kv_heads 2 page head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    positions: Int32[Array, "tokens"],
    metadata: PagedMetadata,
) -> Float[Array, "pages kv_heads 2 page head_dim"]:
    """The pool with the tokens' k and v in their slots; padding tokens land in the guard page. Updates kv in place when it is donated."""
    page_size = kv.shape[3]
    rows, real = row_of_token(metadata, k.shape[0]), jnp.maximum(positions, 0)
    page = jnp.where(positions >= 0, metadata.page_tables[rows, real // page_size], 0)
    return kv.at[page, :, :, real % page_size].set(jnp.stack([k, v], axis=2).astype(kv.dtype), mode="promise_in_bounds")


def _chunk_pages(page_size: int, pages_per_row: int) -> int:
    return min(max(CHUNK_KEYS // page_size, 1), pages_per_row)


def _pad_tables(tables: Int32[Array, "rows pages_per_row"], chunk_pages: int) -> Int32[Array, "rows padded"]:
    return jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % chunk_pages)))


def _through_chunks(step, state: Running, first: Int32[Array, ""], stop: Int32[Array, ""], chunks: int) -> Running:
    """step(chunk, state) for the chunks in [first, stop); without a loop when there is only one."""
    if chunks == 1:
        return step(jnp.zeros((), jnp.int32), state)
    return jax.lax.fori_loop(first, stop, step, state)


def _visible(
    keys: Int32[Array, "... 1 keys"], positions: Int32[Array, "... queries 1"], window: int | None
) -> Bool[Array, "... queries keys"]:
    seen = keys <= positions
    return seen if window is None else seen & (keys > positions - window)


def _decode(
    q: Float[Array, "rows kv_heads group head_dim"],
    positions: Int32[Array, "rows"],
    kv: Float[Array, "pages kv_heads 2 page head_dim"],
    metadata: PagedMetadata,
    *,
    spec: AttentionSpec,
    sinks: Float[Array, "kv_heads group"] | None,
) -> Float[Array, "rows kv_heads group head_dim"]:
    """One query per row; all rows together, chunk by chunk."""
    rows, page_size, wide = q.shape[0], kv.shape[3], accumulation_dtype(q.dtype)
    chunk_pages = _chunk_pages(page_size, metadata.page_tables.shape[1])
    tables = _pad_tables(metadata.page_tables[:rows], chunk_pages)
    lengths = jnp.where(positions >= 0, jnp.minimum(metadata.kv_lengths[:rows], positions + 1), 0)
    floor = jnp.zeros_like(lengths) if spec.window is None else jnp.maximum(lengths - spec.window, 0)
    chunk_keys = chunk_pages * page_size

    def step(chunk: Int32[Array, ""], state: Running) -> Running:
        ids = jax.lax.dynamic_slice_in_dim(tables, chunk * chunk_pages, chunk_pages, axis=1)
        pages = kv.at[ids].get(mode="promise_in_bounds")
        keys = (chunk * chunk_keys + jnp.arange(chunk_keys, dtype=jnp.int32)).reshape(1, chunk_pages, page_size)
        seen = (keys < lengths[:, None, None]) & (keys >= floor[:, None, None])
        scores = jnp.einsum("rkgh,rpksh->rkgps", q, pages[:, :, :, 0], preferred_element_type=wide)
        values = jnp.where(seen[:, :, None, :, None], pages[:, :, :, 1], 0)

        def weigh(weights: Float[Array, "rows kv_heads group keys"]) -> Float[Array, "rows kv_heads group head_dim"]:
            weights = weights.astype(values.dtype).reshape(*weights.shape[:3], chunk_pages, page_size)
            return jnp.einsum("rkgps,rpksh->rkgh", weights, values, preferred_element_type=wide)

        flat = shape_scores(scores, spec).reshape(*scores.shape[:3], chunk_keys)
        return absorb(state, flat, seen.reshape(rows, 1, 1, chunk_keys), weigh)

    state = start(q, None if sinks is None else jnp.broadcast_to(sinks[None], q.shape[:3]))
    first = jnp.min(jnp.where(lengths > 0, floor, jnp.iinfo(jnp.int32).max)) // chunk_keys
    stop = (jnp.max(lengths) + chunk_keys - 1) // chunk_keys
    state = _through_chunks(step, state, first, stop, tables.shape[1] // chunk_pages)
    return jnp.where(lengths[:, None, None, None] > 0, finish(state), 0).astype(q.dtype)


def _prefill(
    q: Float[Array, "tokens kv_heads group head_dim"],
    positions: Int32[Array, "tokens"],
    kv: Float[Array, "pages kv_heads 2 page head_dim"],
    metadata: PagedMetadata,
    *,
    spec: AttentionSpec,
    sinks: Float[Array, "kv_heads group"] | None,
) -> Float[Array, "tokens kv_heads group head_dim"]:
    """Blocks of queries of one row each, one after the other; as many as the rows really have."""
    decode, tokens = metadata.decode_rows, q.shape[0]
    block = min(BLOCK_QUERIES, tokens)
    page_size = kv.shape[3]
    chunk_pages = _chunk_pages(page_size, metadata.page_tables.shape[1])
    tables = _pad_tables(metadata.page_tables[decode:], chunk_pages)
    starts, lengths = metadata.query_starts[decode:] - decode, metadata.query_lengths[decode:]
    ends = jnp.cumsum((lengths + block - 1) // block)
    padded = jnp.pad(q, ((0, block), (0, 0), (0, 0), (0, 0)))
    where = jnp.pad(positions, (0, block), constant_values=-1)

    def one(index: Int32[Array, ""], out: Float[Array, "padded kv_heads group head_dim"]) -> Float[Array, "padded kv_heads group head_dim"]:
        row = jnp.sum(ends <= index).astype(jnp.int32)
        blocks = (lengths[row] + block - 1) // block
        offset = (index - ends[row] + blocks) * block
        first = starts[row] + offset
        mine = jnp.arange(block, dtype=jnp.int32) < lengths[row] - offset
        at = jnp.where(mine, jax.lax.dynamic_slice_in_dim(where, first, block), -1)
        queries = jax.lax.dynamic_slice_in_dim(padded, first, block)
        result = _block(queries, at, kv, tables[row], metadata.kv_lengths[decode + row], spec=spec, sinks=sinks)
        before = jax.lax.dynamic_slice_in_dim(out, first, block)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(mine[:, None, None, None], result, before), first, axis=0)

    return jax.lax.fori_loop(jnp.zeros((), jnp.int32), ends[-1], one, jnp.where(padded == padded, 0, 0).astype(q.dtype))[:tokens]


def _block(
    q: Float[Array, "queries kv_heads group head_dim"],
    positions: Int32[Array, "queries"],
    kv: Float[Array, "pages kv_heads 2 page head_dim"],
    table: Int32[Array, "padded"],
    length: Int32[Array, ""],
    *,
    spec: AttentionSpec,
    sinks: Float[Array, "kv_heads group"] | None,
) -> Float[Array, "queries kv_heads group head_dim"]:
    """Queries of one row through the chunks of its pages that they can see; position -1 sees nothing."""
    page_size, wide, blocks = kv.shape[3], accumulation_dtype(q.dtype), q.shape[0]
    chunk_pages = _chunk_pages(page_size, table.shape[0])
    chunk_keys = chunk_pages * page_size
    stop = jnp.minimum(jnp.max(positions) + 1, length)
    lowest = jnp.min(jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max))
    floor = jnp.zeros_like(stop) if spec.window is None else jnp.maximum(lowest - spec.window + 1, 0)
    by_head = q.transpose(1, 2, 0, 3)

    def step(chunk: Int32[Array, ""], state: Running) -> Running:
        ids = jax.lax.dynamic_slice_in_dim(table, chunk * chunk_pages, chunk_pages)
        pages = kv.at[ids].get(mode="promise_in_bounds")
        keys = chunk * chunk_keys + jnp.arange(chunk_keys, dtype=jnp.int32)
        known = (keys >= floor) & (keys < stop)
        seen = _visible(keys[None], positions[:, None], spec.window) & known[None]
        scores = jnp.einsum("kgqh,pksh->kgqps", by_head, pages[:, :, 0], preferred_element_type=wide)
        values = jnp.where(known.reshape(chunk_pages, 1, page_size, 1), pages[:, :, 1], 0)

        def weigh(weights: Float[Array, "kv_heads group queries keys"]) -> Float[Array, "kv_heads group queries head_dim"]:
            weights = weights.astype(values.dtype).reshape(*weights.shape[:3], chunk_pages, page_size)
            return jnp.einsum("kgqps,pksh->kgqh", weights, values, preferred_element_type=wide)

        return absorb(state, shape_scores(scores, spec).reshape(*scores.shape[:3], chunk_keys), seen[None, None], weigh)

    state = start(by_head, None if sinks is None else jnp.broadcast_to(sinks[..., None], by_head.shape[:3]))
    state = _through_chunks(step, state, floor // chunk_keys, (stop + chunk_keys - 1) // chunk_keys, table.shape[0] // chunk_pages)
    return finish(state).transpose(2, 0, 1, 3).astype(q.dtype)
