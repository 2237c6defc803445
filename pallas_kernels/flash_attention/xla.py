"""Flash attention in plain XLA: blocks of queries, each through the blocks of keys it can see, with a running softmax."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention import AttentionSpec, Running, absorb, accumulation_dtype, finish, shape_scores, start

BLOCK_QUERIES = 256
BLOCK_KEYS = 512


def flash_attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    *,
    spec: AttentionSpec,
    causal: Literal["causal", "full"],
    kv_lengths: Int32[Array, "batch"] | None,
    query_offsets: Int32[Array, "batch"] | None,
    sinks: Float[Array, "heads"] | None,
) -> Float[Array, "batch queries heads head_dim"]:
    """See api.flash_attention."""
    batch, queries, heads, head_dim = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    block = min(BLOCK_QUERIES, queries)
    grouped = jnp.pad(q, ((0, 0), (0, -queries % block), (0, 0), (0, 0)))
    grouped = grouped.reshape(batch, -1, block, kv_heads, heads // kv_heads, head_dim).transpose(1, 0, 3, 4, 2, 5)
    sinks = None if sinks is None else sinks.reshape(1, kv_heads, heads // kv_heads, 1)
    lengths = jnp.full((batch,), keys, jnp.int32) if kv_lengths is None else kv_lengths
    offsets = jnp.zeros((batch,), jnp.int32) if query_offsets is None else query_offsets
    k, v = _keys_first(k), _keys_first(v)

    def one(
        item: tuple[Int32[Array, ""], Float[Array, "batch kv_heads group queries head_dim"]],
    ) -> Float[Array, "batch kv_heads group queries head_dim"]:
        positions = offsets[:, None] + item[0] * block + jnp.arange(block, dtype=jnp.int32)[None]
        if causal == "full":
            positions = jnp.broadcast_to(lengths[:, None], positions.shape)
        return _block(item[1], k, v, positions, lengths, spec=spec, sinks=sinks)

    out = jax.lax.map(one, (jnp.arange(grouped.shape[0], dtype=jnp.int32), grouped))
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, head_dim)[:, :queries]


def _keys_first(x: Float[Array, "batch keys kv_heads head_dim"]) -> Float[Array, "blocks batch keys_of_block kv_heads head_dim"]:
    block = min(BLOCK_KEYS, x.shape[1])
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
    return padded.reshape(x.shape[0], -1, block, *x.shape[2:]).swapaxes(0, 1)


def _block(
    q: Float[Array, "batch kv_heads group queries head_dim"],
    k: Float[Array, "blocks batch keys kv_heads head_dim"],
    v: Float[Array, "blocks batch keys kv_heads head_dim"],
    positions: Int32[Array, "batch queries"],
    lengths: Int32[Array, "batch"],
    *,
    spec: AttentionSpec,
    sinks: Float[Array, "1 kv_heads group 1"] | None,
) -> Float[Array, "batch kv_heads group queries head_dim"]:
    """One block of queries through the blocks of keys between the lowest and the highest that any of them sees."""
    wide, block = accumulation_dtype(q.dtype), k.shape[2]

    def step(chunk: Int32[Array, ""], state: Running) -> Running:
        index = chunk * block + jnp.arange(block, dtype=jnp.int32)
        exists = index[None] < lengths[:, None]
        seen = exists[:, None] & (index[None, None] <= positions[..., None])
        if spec.window is not None:
            seen &= index[None, None] > positions[..., None] - spec.window
        keys = jax.lax.dynamic_index_in_dim(k, chunk, keepdims=False)
        values = jnp.where(exists[:, :, None, None], jax.lax.dynamic_index_in_dim(v, chunk, keepdims=False), 0)
        scores = shape_scores(jnp.einsum("bkgqh,bskh->bkgqs", q, keys, preferred_element_type=wide), spec)

        def weigh(weights: Float[Array, "batch kv_heads group queries keys"]) -> Float[Array, "batch kv_heads group queries head_dim"]:
            return jnp.einsum("bkgqs,bskh->bkgqh", weights.astype(values.dtype), values, preferred_element_type=wide)

        return absorb(state, scores, seen[:, None, None], weigh)

    state = start(q, None if sinks is None else jnp.broadcast_to(sinks, q.shape[:4]))
    last = jnp.max(jnp.minimum(positions[:, -1] + 1, lengths))
    first = jnp.zeros_like(last) if spec.window is None else jnp.maximum(jnp.min(positions[:, 0]) - spec.window + 1, 0)
    if k.shape[0] == 1:
        state = step(jnp.zeros((), jnp.int32), state)
    else:
        state = jax.lax.fori_loop(first // block, (last + block - 1) // block, step, state)
    return finish(state).astype(q.dtype)
