"""The online softmax of attention kernels for TPUs: running quantities in VMEM, one step of keys at a time.

Queries of a kv head are rows (lines) of a matrix, token after token, each with its group of heads. A key and its value lie side by side;
where head_dim is no multiple of the lanes they share vectors: the query has zeros where the value lies, and of the weighted sums the
half that belongs to the value counts. The matrix unit works on whole vectors anyway. Knows no pages and no copies.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.attention import LOWEST, AttentionSpec, precision
from pallas_kernels.tensorcore import LANES, ceil_to

NOWHERE = -(1 << 30)  # a line that sees nothing


class Softmax(NamedTuple):
    """Refs, for each kv head and line: the largest score so far and the sum of weights (in all lanes), the weighted sum of values."""

    top: Any
    total: Any
    weighted: Any

    @classmethod
    def scratch(cls, kv_heads: int, lines: int, lanes: int) -> "Softmax":
        """What holds them."""
        one = pltpu.VMEM((kv_heads, lines, LANES), jnp.float32)
        return cls(one, one, pltpu.VMEM((kv_heads, lines, lanes), jnp.float32))


class Step(NamedTuple):
    """A step of keys, for some heads: queries [heads, lines, lanes], keys and values [heads, keys, lanes of both], scales of both."""

    q: Any
    both: Any
    scales: tuple[Any, Any] | None = None


def joined(head_dim: int) -> bool:
    """Whether key and value share vectors."""
    return head_dim % LANES != 0


def both_lanes(head_dim: int) -> int:
    """Of a key and its value side by side."""
    return ceil_to(2 * head_dim, LANES)


def query_lanes(head_dim: int) -> int:
    """Of a query, and of what comes out."""
    return both_lanes(head_dim) if joined(head_dim) else head_dim


def outcome(out: Float[Array, "*lines lanes"], head_dim: int) -> Float[Array, "*lines head_dim"]:
    """The part of what comes out that counts."""
    return out[..., head_dim : 2 * head_dim] if joined(head_dim) else out


def blocks(
    q: Float[Array, "tokens heads head_dim"], *, tokens: int, kv_heads: int, lines: int
) -> Float[Array, "blocks kv_heads lines lanes"]:
    """Queries by block of `tokens` and kv head, as lines; filled up with zeros."""
    count, heads, head_dim = q.shape
    group, lanes = heads // kv_heads, query_lanes(head_dim)
    q = jnp.pad(q, ((0, -count % tokens), (0, 0), (0, lanes - head_dim)))
    cut = q.reshape(-1, tokens, kv_heads, group, lanes).swapaxes(1, 2).reshape(-1, kv_heads, tokens * group, lanes)
    return jnp.pad(cut, ((0, 0), (0, 0), (0, lines - tokens * group), (0, 0)))


def unblocks(
    out: Float[Array, "blocks kv_heads lines lanes"], *, tokens: int, head_dim: int, group: int
) -> Float[Array, "padded_tokens heads head_dim"]:
    """The inverse of `blocks`."""
    kv_heads = out.shape[1]
    out = outcome(out, head_dim)[:, :, : tokens * group]
    return out.reshape(-1, kv_heads, tokens, group, head_dim).swapaxes(1, 2).reshape(-1, kv_heads * group, head_dim)


def lines_of_sinks(sinks: Float[Array, "heads"], *, tokens: int, kv_heads: int, lines: int) -> Float[Array, "lines lanes"]:
    """The sink of each line, a lane for each kv head."""
    found = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, -1).T, (tokens, 1))
    return jnp.pad(found, ((0, lines - found.shape[0]), (0, -kv_heads % LANES)))


def start(softmax: Softmax, head: Any, sinks: Any | None, *, column: Any) -> None:
    """The state of a head before any key; column: the lane of its sinks."""
    shape = softmax.top.shape[1:]
    if sinks is None:
        softmax.top[head] = jnp.full(shape, LOWEST, jnp.float32)
        softmax.total[head] = jnp.zeros(shape, jnp.float32)
    else:
        lane = lax.broadcasted_iota(jnp.int32, sinks.shape, 1)
        own = jnp.sum(jnp.where(lane == column, sinks[...], 0.0), axis=1, keepdims=True)
        softmax.top[head] = jnp.broadcast_to(own, shape)
        softmax.total[head] = jnp.ones(shape, jnp.float32)
    softmax.weighted[head] = jnp.zeros(softmax.weighted.shape[1:], jnp.float32)


def finish(softmax: Softmax, head: Any, dtype: Any) -> Any:
    """Weighted mean of the values of a head; 0 for a line that saw no key."""
    total = softmax.total[head][:, :1]
    return (softmax.weighted[head] / jnp.where(total > 0, total, 1.0)).astype(dtype)


def visible(lines: int, key: Any, *, position: Any, group: int, window: int | None, between: tuple[Any, Any] | None = None) -> Any:
    """Which lines [1, lines, 1] see which keys [1, 1, keys], causally; position: of the first line's token; between: tokens that count.

    Line l is token l // group: it is compared with keys times group, which needs no division.
    """
    line = lax.broadcasted_iota(jnp.int32, (1, lines, 1), 1)
    if between is not None:
        line = jnp.where((line >= between[0] * group) & (line < between[1] * group), line, NOWHERE)
    edge = (key - position) * group
    seen = line >= edge
    return seen if window is None else seen & (line < edge + window * group)


def absorb(softmax: Softmax, heads: Any, step: Step, seen: Any | None, *, spec: AttentionSpec, head_dim: int) -> None:
    """A step enters the softmax of some heads; seen: which keys each line sees (None: all of them)."""
    q, both, scales = step
    exact, wide, split = precision(q.dtype), jnp.float32, not joined(head_dim)
    keys = (both[:, :, :head_dim] if split else both).astype(q.dtype)
    scores = lax.dot_general(q, keys, (((2,), (2,)), ((0,), (0,))), precision=exact, preferred_element_type=wide)
    if scales is not None:
        scores = scores * scales[0]
    scores = scores * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    if seen is not None:
        scores = jnp.where(seen, scores, LOWEST)
    top = softmax.top[heads][:, :, :1]
    highest = jnp.maximum(top, jnp.max(scores, axis=2, keepdims=True))
    weights = jnp.exp(scores - highest)
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    decay = jnp.exp(top - highest)
    total = softmax.total[heads][:, :, :1] * decay + jnp.sum(weights, axis=2, keepdims=True)
    if scales is not None:
        weights = weights * scales[1]
    values = (both[:, :, head_dim:] if split else both).astype(q.dtype)
    weighted = lax.dot_general(weights.astype(q.dtype), values, (((2,), (1,)), ((0,), (0,))), precision=exact, preferred_element_type=wide)
    softmax.weighted[heads] = softmax.weighted[heads] * decay + weighted
    shape = (*highest.shape[:2], LANES)
    softmax.top[heads] = jnp.broadcast_to(highest, shape)
    softmax.total[heads] = jnp.broadcast_to(total, shape)
