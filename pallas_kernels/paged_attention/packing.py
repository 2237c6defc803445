"""How a packed step goes through a pool that plain jnp writes, for every implementation that does not write it itself.

`in_parts` applies rope, writes the new keys and values, and hands the decode rows to one part and the other tokens to another. The others
are what such parts need: rows as lines of queries, and tokens cut into blocks. Knows no arithmetic of attention.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention import AttentionSpec, accumulation_dtype, rope_table, rotate
from pallas_kernels.paged_attention.api import PagedMetadata, PagedResult
from pallas_kernels.paged_attention.pool import Pool, QuantizedKV, code_dtype, quantize, values_of

Part = Callable[[Array, Array, Pool, PagedMetadata], Array]  # grouped q and positions of its tokens, the pool, the metadata


def tuning_key(kv: Pool, q: Float[Array, "tokens heads head_dim"]) -> dict[str, int | str]:
    """What block sizes depend on; kv_dtype stands there for a quantised pool only."""
    sizes = {"page_size": page_size_of(kv), "kv_heads": values_of(kv).shape[1], "heads": q.shape[1]}
    key = sizes | {"head_dim": q.shape[2], "dtype": q.dtype.name}
    codes = code_dtype(kv)
    return key if codes is None else key | {"kv_dtype": codes}


def page_size_of(kv: Pool) -> int:
    """Tokens of a page, by head or side by side."""
    return values_of(kv).shape[-2]


def in_parts(  # noqa: PLR0913
    q: Float[Array, "tokens heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    positions: Int32[Array, "tokens"],
    kv: Pool,
    metadata: PagedMetadata,
    *,
    spec: AttentionSpec,
    rope: Float[Array, "half_rotary"] | None,
    parts: tuple[Part, Part],
) -> PagedResult:
    """What implementations with this pool share: rotate, write the new keys and values, then attend with the tokens of the decode rows
    by the first part and with the others by the second; a part without tokens is left out."""
    tokens, heads, head_dim = q.shape
    kv_heads, decode = k.shape[1], metadata.decode_size
    if rope is not None:
        table = rope_table(positions, rope.astype(accumulation_dtype(q.dtype)), spec.rope_scale)
        q, k = rotate(q, table), rotate(k, table)
    kv = write(kv, k, v, positions, metadata)
    grouped = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim)
    cuts = ((0, decode), (decode, tokens))
    found = [part(grouped[a:b], positions[a:b], kv, metadata) for part, (a, b) in zip(parts, cuts, strict=True) if b > a]
    out = found[0] if len(found) == 1 else jnp.concatenate(found)
    return PagedResult(out.reshape(tokens, heads, head_dim), kv)


def write(
    kv: Pool,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    positions: Int32[Array, "tokens"],
    metadata: PagedMetadata,
) -> Pool:
    """The pool with the tokens' k and v in their slots; padding tokens land in the guard page. Donate kv: updated in place."""
    page_size = page_size_of(kv)
    real = jnp.maximum(positions, 0)
    page = take(metadata.page_tables, row_of_token(metadata, k.shape[0]), lax.div(real, jnp.int32(page_size)))
    page = jnp.where(positions >= 0, page, 0)
    new = jnp.stack([k, v], axis=2)
    slot = lax.rem(real, jnp.int32(page_size))

    def put(pool: Array, new: Array) -> Array:
        if values_of(kv).ndim == 5:  # by head
            return pool.at[page, :, :, slot].set(new, mode="promise_in_bounds", wrap_negative_indices=False)
        if pool.ndim == 3:  # scales: a page's keys and then its values
            slots = slot[:, None] + jnp.array([[0, page_size]], jnp.int32)
            return pool.at[page[:, None], :, slots].set(new.swapaxes(1, 2), mode="promise_in_bounds", wrap_negative_indices=False)
        flat = new.reshape(*new.shape[:2], -1)
        flat = jnp.pad(flat, ((0, 0), (0, 0), (0, pool.shape[3] - flat.shape[2])))
        return pool.at[page, :, slot].set(flat, mode="promise_in_bounds", wrap_negative_indices=False)

    return jax.tree.map(put, kv, quantize(new, kv.values.dtype) if isinstance(kv, QuantizedKV) else new)


def row_of_token(metadata: PagedMetadata, tokens: int) -> Int32[Array, "tokens"]:
    """The row that owns each packed token; some row for padding tokens."""
    decode, size = metadata.decode_rows, metadata.decode_size
    rows = jnp.repeat(jnp.arange(decode, dtype=jnp.int32), metadata.decode_tokens)
    if tokens == size:
        return rows
    index = jnp.arange(size, tokens, dtype=jnp.int32)[:, None]
    starts, lengths = metadata.query_starts[None, decode:], metadata.query_lengths[None, decode:]
    owns = (index >= starts) & (index < starts + lengths)
    return jnp.concatenate([rows, decode + lax.argmax(owns, 1, jnp.int32)])


def take(array: Array, *indices: Int32[Array, "..."]) -> Array:
    """array[indices], known to be inside."""
    return array.at[indices].get(mode="promise_in_bounds", wrap_negative_indices=False)


def ceil_div(numerator: Int32[Array, "..."], denominator: int) -> Int32[Array, "..."]:
    """Ceiling division of integers >= 0."""
    return lax.div(numerator + (denominator - 1), jnp.full_like(numerator, denominator))


def by_row(q: Float[Array, "tokens kv_heads group head_dim"], rows: int) -> Float[Array, "rows kv_heads lines head_dim"]:
    """Decode rows' queries as lines of their rows: token after token, each with the group's heads."""
    _, kv_heads, _, head_dim = q.shape
    return q.reshape(rows, -1, *q.shape[1:]).swapaxes(1, 2).reshape(rows, kv_heads, -1, head_dim)


def by_token(lines: Float[Array, "rows kv_heads lines head_dim"], shape: tuple[int, ...]) -> Float[Array, "tokens kv_heads group head_dim"]:
    """The inverse of `by_row`; shape: that of its q."""
    rows, kv_heads, _, head_dim = lines.shape
    return lines.reshape(rows, kv_heads, -1, shape[2], head_dim).swapaxes(1, 2).reshape(shape)


def keys_seen(positions: Int32[Array, "tokens"], metadata: PagedMetadata) -> tuple[Int32[Array, "rows per_row"], Int32[Array, "rows"]]:
    """Up to which key each token of each decode row sees (0: padding), and the row's last one does."""
    position = positions.reshape(metadata.decode_rows, metadata.decode_tokens)
    stops = jnp.where(position >= 0, jnp.minimum(metadata.kv_lengths[: metadata.decode_rows, None], position + 1), 0)
    return stops, jnp.max(stops, axis=1)


class Blocks(NamedTuple):
    """Blocks of queries of one row each. token: index among the prefill tokens; position: -1 where the block has no query."""

    row: Int32[Array, "blocks"]
    token: Int32[Array, "blocks queries"]
    position: Int32[Array, "blocks queries"]
    place: Int32[Array, "tokens"]
    total: Int32[Array, ""]


def cut(metadata: PagedMetadata, positions: Int32[Array, "tokens"], queries: int, multiple: int) -> Blocks:
    """The prefill tokens cut into blocks of at most `queries`; there is room for as many as the tokens could ever need."""
    decode, size, tokens = metadata.decode_rows, metadata.decode_size, positions.shape[0]
    starts, lengths = metadata.query_starts[decode:] - size, metadata.query_lengths[decode:]
    room = -(-tokens // queries) + lengths.shape[0]
    room = -(-room // multiple) * multiple
    counts = ceil_div(lengths, queries)
    ends = jnp.cumsum(counts)
    begins = ends - counts
    block = jnp.arange(room, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None] <= block[:, None], axis=1, dtype=jnp.int32), lengths.shape[0] - 1)
    offset = ((block - take(begins, row)) * queries)[:, None] + jnp.arange(queries, dtype=jnp.int32)[None]
    mine = (offset < take(lengths, row)[:, None]) & (block < ends[-1])[:, None]
    token = jnp.where(mine, take(starts, row)[:, None] + offset, 0)
    owner = row_of_token(metadata, size + tokens)[size:] - decode
    within = jnp.arange(tokens, dtype=jnp.int32) - take(starts, owner)
    place = jnp.clip(take(begins, owner) * queries + within, 0, room * queries - 1)
    return Blocks(row + decode, token, jnp.where(mine, take(positions, token), -1), place, ends[-1])
