"""What flash attention means, slowly: the whole matrix of scores, in the inputs' own precision."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention import AttentionSpec
from pallas_kernels.flash_attention.api import SegmentIds


def flash_attention(  # noqa: PLR0913
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    *,
    spec: AttentionSpec,
    causal: Literal["causal", "full"],
    kv_lengths: Int32[Array, "batch"] | None,
    query_offsets: Int32[Array, "batch"] | None,
    sinks: Float[Array, "heads"] | None,
    segment_ids: SegmentIds | None,
) -> Float[Array, "batch queries heads head_dim"]:
    """See api.flash_attention."""
    (batch, queries, heads, _), length = q.shape, k.shape[1]
    k, v = (jnp.repeat(x, heads // k.shape[2], axis=2) for x in (k, v))
    index = jnp.arange(length, dtype=jnp.int32)[None, None]
    position = jnp.arange(queries, dtype=jnp.int32)[None, :, None]
    seen = jnp.ones((batch, queries, length), bool)
    if query_offsets is not None:
        position = position + query_offsets[:, None, None]
    if kv_lengths is not None:
        seen &= index < kv_lengths[:, None, None]
    if causal == "causal":
        seen &= index <= position
    if spec.window is not None:
        seen &= index > position - spec.window
    if segment_ids is not None:
        seen &= segment_ids.queries[:, :, None] == segment_ids.keys[:, None]
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    if sinks is not None:  # one more key whose value is 0
        sink = jnp.broadcast_to(sinks.astype(scores.dtype)[None, :, None, None], (batch, heads, queries, 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jnp.where(seen[:, None], jax.nn.softmax(scores, axis=-1)[..., :length], 0)
    values = jnp.where(jnp.any(seen, axis=1)[:, :, None, None], v, 0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, values)
