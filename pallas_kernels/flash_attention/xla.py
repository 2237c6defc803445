"""Flash attention in plain XLA: blocks of queries, each through the blocks of keys it can see, with a running softmax.

The queries are cut into blocks that are taken one after the other, all batch entries and heads of a block together, and a block stops
at the last key that any of its queries sees. Scores exist for one block of queries and one block of keys at a time.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels import dispatch, tuning
from pallas_kernels.attention import AttentionSpec, Running, absorb, accumulation_dtype, finish, precision, shape_scores, start
from pallas_kernels.flash_attention.api import SegmentIds, tuning_key


class Sizes(NamedTuple):
    """Queries and keys of a block."""

    queries: int
    keys: int


def heuristic(platform: str, key: dict[str, int | str]) -> dict[str, int]:
    """Sizes that were never measured."""
    return (Sizes(128, 512) if platform == "cpu" else Sizes(512, 1024))._asdict()


def candidates(platform: str, key: dict[str, int | str]) -> list[dict[str, int]]:
    """Sizes worth measuring."""
    base = Sizes(**heuristic(platform, key))
    return [Sizes(base.queries * a // 2, base.keys * b // 2)._asdict() for a in (1, 2, 4) for b in (1, 2, 4)]


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
    batch, queries, heads, head_dim = q.shape
    kv_heads, keys = k.shape[2], k.shape[1]
    sizes = Sizes(**tuning.sizes("flash_attention", "xla", dispatch.target(), tuning_key(q, kv_heads)))
    block = min(sizes.queries, queries)
    cut = jnp.pad(q, ((0, 0), (0, -queries % block), (0, 0), (0, 0)))
    cut = cut.reshape(batch, -1, block, kv_heads, heads // kv_heads, head_dim).transpose(1, 0, 3, 4, 2, 5)
    k, v = _by_block(k, sizes.keys), _by_block(v, sizes.keys)
    lengths = jnp.full((batch,), keys, jnp.int32) if kv_lengths is None else kv_lengths
    offsets = jnp.zeros((batch,), jnp.int32) if query_offsets is None else query_offsets
    sinks = None if sinks is None else sinks.reshape(1, kv_heads, heads // kv_heads, 1)
    ids = segment_ids and SegmentIds(_ids_by_block(segment_ids.queries, block), _ids_by_block(segment_ids.keys, sizes.keys))

    def attend(index: Int32[Array, ""]) -> Float[Array, "batch kv_heads group queries head_dim"]:
        positions = offsets[:, None] + index * block + jnp.arange(block, dtype=jnp.int32)[None]
        if causal == "full":
            positions = jnp.broadcast_to(lengths[:, None], positions.shape)
        part = lax.dynamic_index_in_dim(cut, index, keepdims=False)
        own_ids = None if ids is None else ids._replace(queries=lax.dynamic_index_in_dim(ids.queries, index, keepdims=False))
        return _attend_block(part, k, v, positions, lengths, spec=spec, sinks=sinks, ids=own_ids)

    count = cut.shape[0]
    out = attend(jnp.zeros((), jnp.int32))[None] if count == 1 else lax.map(attend, jnp.arange(count, dtype=jnp.int32))
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, head_dim)[:, :queries]


def _by_block(x: Shaped[Array, "batch keys kv_heads head_dim"], keys: int) -> Shaped[Array, "blocks batch kv_heads keys_of_block head_dim"]:
    """Contiguous blocks of keys, padded with zeros at the end."""
    batch, length, kv_heads, head_dim = x.shape
    block = min(keys, length)
    padded = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    return padded.reshape(batch, -1, block, kv_heads, head_dim).transpose(1, 0, 3, 2, 4)


def _ids_by_block(ids: Int32[Array, "batch length"], size: int) -> Int32[Array, "blocks batch length_of_block"]:
    """As `_by_block`, for segment ids."""
    return _by_block(ids[..., None, None], size)[:, :, 0, :, 0]


def _attend_block(
    q: Float[Array, "batch kv_heads group queries head_dim"],
    k: Float[Array, "blocks batch kv_heads keys head_dim"],
    v: Float[Array, "blocks batch kv_heads keys head_dim"],
    positions: Int32[Array, "batch queries"],
    lengths: Int32[Array, "batch"],
    *,
    spec: AttentionSpec,
    sinks: Float[Array, "1 kv_heads group 1"] | None,
    ids: SegmentIds | None,
) -> Float[Array, "batch kv_heads group queries head_dim"]:
    """One block of queries through the blocks of keys between the lowest and the highest that any of them sees.

    ids: of these queries [batch, queries] and of all keys [blocks, batch, keys].
    """
    batch, kv_heads, group, queries, head_dim = q.shape
    wide, exact, blocks, keys = accumulation_dtype(q.dtype), precision(q.dtype), k.shape[0], k.shape[3]
    flat = q.reshape(batch, kv_heads, group * queries, head_dim)

    def step(block: Int32[Array, ""], state: Running) -> Running:
        index = (block * keys + jnp.arange(keys, dtype=jnp.int32))[None]
        exists = index < lengths[:, None]
        seen = exists[:, None] & (index[:, None] <= positions[..., None])
        if spec.window is not None:
            seen &= index[:, None] > positions[..., None] - spec.window
        if ids is not None:
            seen &= ids.queries[..., None] == lax.dynamic_index_in_dim(ids.keys, block, keepdims=False)[:, None]
        values = jnp.where(exists[:, None, :, None], lax.dynamic_index_in_dim(v, block, keepdims=False), 0)

        def weigh(weights: Float[Array, "batch kv_heads group queries keys"]) -> Float[Array, "batch kv_heads group queries head_dim"]:
            weights = weights.astype(values.dtype).reshape(batch, kv_heads, group * queries, keys)
            return jnp.einsum("bkms,bksh->bkmh", weights, values, precision=exact, preferred_element_type=wide).reshape(q.shape)

        own = lax.dynamic_index_in_dim(k, block, keepdims=False)
        scores = jnp.einsum("bkmh,bksh->bkms", flat, own, precision=exact, preferred_element_type=wide).reshape(*q.shape[:4], keys)
        return absorb(state, shape_scores(scores, spec), seen[:, None, None], weigh)

    state = start(q, sinks)
    if blocks == 1:
        state = step(jnp.zeros((), jnp.int32), state)
    else:
        stop = jnp.max(jnp.minimum(positions[:, -1] + 1, lengths))
        floor = jnp.zeros_like(stop) if spec.window is None else jnp.maximum(jnp.min(positions[:, 0]) - (spec.window - 1), 0)
        state = lax.fori_loop(floor // keys, (stop + keys - 1) // keys, step, state)
    return finish(state).astype(q.dtype)
