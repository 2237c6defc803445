"""Attention over contiguous keys and values: a batch entry is a sequence, ragged by lengths, or several sequences packed by segment ids.

q, k and v come in already rotated and leave as attention outputs; nothing is cached or written. Knows no pages and no mesh.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.checks import describe, require, require_dtype, require_shape

OP = "flash_attention"


class SegmentIds(NamedTuple):
    """Which of the sequences packed into a batch entry each query and key belongs to: any numbers."""

    queries: Int32[Array, "batch queries"]
    keys: Int32[Array, "batch keys"]


def flash_attention(  # noqa: PLR0913
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    *,
    spec: AttentionSpec,
    causal: Literal["causal", "full"],
    kv_lengths: Int32[Array, "batch"] | None = None,
    query_offsets: Int32[Array, "batch"] | None = None,
    sinks: Float[Array, "heads"] | None = None,
    segment_ids: SegmentIds | None = None,
    implementation: str = "auto",
) -> Float[Array, "batch queries heads head_dim"]:
    """softmax(scale * q k^T) v without ever holding the whole matrix of scores (FlashAttention, arXiv 2205.14135).

    causal: "causal" lets query i of batch entry b see keys up to query_offsets[b] + i (None: i), "full" lets it see all.
    kv_lengths: keys of each entry (None: all); what lies beyond, NaN included, never reaches a result.
    segment_ids: a query sees only keys of its own id. spec.window needs "causal". sinks: one score per head that takes its share of
    the softmax. Head h reads kv head h // (heads / kv_heads). A query that sees no key gets 0. Raises ValueError when the arguments do
    not fit together, and NotImplementedError when an implementation that was asked for by name refuses them.
    """
    rest = {"kv_lengths": kv_lengths, "query_offsets": query_offsets, "sinks": sinks, "segment_ids": segment_ids}
    check(q, k, v, spec=spec, causal=causal, **rest)
    module = dispatch.resolve(OP, implementation, dispatch.target(), tuning_key(q, k.shape[2]))
    return module.flash_attention(q, k, v, spec=spec, causal=causal, **rest)


def tuning_key(q: Float[Array, "batch queries heads head_dim"], kv_heads: int) -> dispatch.Key:
    """What block sizes depend on, and whether an implementation can run."""
    return {"kv_heads": kv_heads, "heads": q.shape[2], "head_dim": q.shape[3], "dtype": q.dtype.name}


def check(  # noqa: PLR0913
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: str,
    spec: AttentionSpec,
    kv_lengths: Array | None = None,
    query_offsets: Array | None = None,
    sinks: Array | None = None,
    segment_ids: SegmentIds | None = None,
) -> None:
    """Refuse arguments that do not fit together (ValueError)."""
    require(causal in ("causal", "full"), OP, f"causal={causal!r}", "use 'causal' or 'full'")
    require(causal == "causal" or spec.window is None, OP, f"window={spec.window} with causal='full'", "a window looks back: use 'causal'")
    require(
        causal == "causal" or query_offsets is None,
        OP,
        "query_offsets with causal='full'",
        "offsets only move the causal edge: leave them away",
    )
    require(q.ndim == 4, OP, f"q is {describe(q)}", "it must have shape [batch, queries, heads, head_dim]")
    require(k.ndim == 4, OP, f"k is {describe(k)}", "it must have shape [batch, keys, kv_heads, head_dim]")
    batch, _, heads, head_dim = q.shape
    require_shape(OP, "k", k, (batch, k.shape[1], k.shape[2], head_dim), "batch, keys, kv_heads, head_dim, as q has them")
    require_shape(OP, "v", v, tuple(k.shape), "that of k")
    require(heads % k.shape[2] == 0, OP, f"{heads} query heads over {k.shape[2]} kv heads", "query heads must be a multiple of kv heads")
    require(jnp.issubdtype(q.dtype, jnp.floating), OP, f"q is {describe(q)}", "it must be of a floating dtype")
    require_dtype(OP, "k", k, q.dtype, "that of q")
    require_dtype(OP, "v", v, q.dtype, "that of q")
    for name, lengths in (("kv_lengths", kv_lengths), ("query_offsets", query_offsets)):
        if lengths is not None:
            require_shape(OP, name, lengths, (batch,), "one per batch entry")
            require_dtype(OP, name, lengths, jnp.int32, "lengths are int32")
    if sinks is not None:
        require_shape(OP, "sinks", sinks, (heads,), "one score per query head")
    for name, found, wanted in zip(("queries", "keys"), segment_ids or (), (q, k), strict=False):
        require_shape(OP, f"segment_ids.{name}", found, (batch, wanted.shape[1]), f"batch, {name}")
        require_dtype(OP, f"segment_ids.{name}", found, jnp.int32, "ids are int32")
