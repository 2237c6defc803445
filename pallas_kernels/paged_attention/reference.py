"""What paged attention means, slowly: each token for itself, against all of its row's pages, in the inputs' own precision."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention import AttentionSpec, accumulation_dtype
from pallas_kernels.paged_attention.api import PagedMetadata, PagedResult
from pallas_kernels.paged_attention.pool import Pool, QuantizedKV, by_head, dequantize, quantize, values_of

kv_layout = by_head


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
    tokens, heads, _ = q.shape
    page, group = values_of(kv).shape[3], heads // k.shape[1]
    if rope is not None:
        q, k = (_rotate(x, positions, rope, spec.rope_scale) for x in (q, k))

    token, starts = jnp.arange(tokens, dtype=jnp.int32)[:, None], metadata.query_starts[None]
    row = jax.lax.argmax((token >= starts) & (token < starts + metadata.query_lengths[None]), 1, jnp.int32)
    real = positions >= 0
    ids = jnp.where(real, metadata.page_tables[row, positions // page], 0)
    new = jnp.stack([k, v], axis=2)
    if isinstance(kv, QuantizedKV):
        new = quantize(new, kv.values.dtype)
    kv = jax.tree.map(lambda pool, new: pool.at[ids, :, :, positions % page].set(new), kv, new)

    def read(row: Int32[Array, ""]) -> Float[Array, "pages kv_heads 2 page head_dim"]:
        pages = jax.tree.map(lambda pool: pool[metadata.page_tables[row]], kv)
        return dequantize(pages, q.dtype) if isinstance(pages, QuantizedKV) else pages

    def attend(q: Float[Array, "heads head_dim"], position: Int32[Array, ""], row: Int32[Array, ""]) -> Float[Array, "heads head_dim"]:
        keys, values = read(row).transpose(2, 0, 3, 1, 4).reshape(2, -1, *k.shape[1:]).repeat(group, axis=2)
        index = jnp.arange(keys.shape[0], dtype=jnp.int32)
        seen = (index <= position) & (index < metadata.kv_lengths[row])
        if spec.window is not None:
            seen &= index > position - spec.window
        scores = jnp.einsum("hd,chd->hc", q, keys) * spec.scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
        scores = jnp.where(seen[None], scores, -jnp.inf)
        if sinks is not None:  # one more key whose value is 0
            scores = jnp.concatenate([scores, sinks.astype(scores.dtype)[:, None]], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[:, : index.shape[0]]
        return jnp.einsum("hc,chd->hd", weights, jnp.where(seen[:, None, None], values, 0))

    out = jax.lax.map(lambda token: attend(*token), (q, positions, row))
    return PagedResult(jnp.where(real[:, None, None], out, 0), kv)


def _rotate(
    x: Float[Array, "tokens heads head_dim"], positions: Int32[Array, "tokens"], rope: Float[Array, "half_rotary"], rope_scale: float
) -> Float[Array, "tokens heads head_dim"]:
    wide = accumulation_dtype(x.dtype)
    angles = positions[:, None, None].astype(wide) * rope.astype(wide)[None, None]
    half = rope.shape[0]
    first, second, rest = (part.astype(wide) for part in jnp.split(x, (half, 2 * half), axis=-1))
    cos, sin = jnp.cos(angles) * rope_scale, jnp.sin(angles) * rope_scale
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)
