"""What the attention ops share: the static description of the arithmetic, rope, and the running softmax over blocks of keys.

An attention op cuts its keys into blocks. Each block's scores enter `absorb`, which keeps the three running quantities of the
online softmax; `finish` divides once in the end. A block in which a query sees nothing leaves that query's state bit for bit as it
was, so a result never depends on how many blocks its neighbours needed. Knows nothing of pages, batches or devices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

LOWEST = -1e30  # stands for minus infinity: finite, so that a difference of two of them is 0 and never NaN


@dataclass(frozen=True)
class AttentionSpec:
    """The static arithmetic of one attention layer; hashable.

    scale multiplies q.k; window is the number of newest keys a query sees, its own included (None: all); soft_cap bounds scores
    by cap * tanh(score / cap) (None: unbounded); rope_scale multiplies rope's cosines and sines (YaRN's attention factor).
    Raises ValueError for values that mean nothing.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    rope_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"AttentionSpec.scale must be a positive number (usually head_dim ** -0.5), got {self.scale}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"AttentionSpec.window counts the keys a query sees and must be >= 1, or None for all; got {self.window}")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"AttentionSpec.soft_cap must be positive, or None for no cap; got {self.soft_cap}")
        if not self.rope_scale > 0:
            raise ValueError(f"AttentionSpec.rope_scale must be positive, got {self.rope_scale}")


class Running(NamedTuple):
    """State of an online softmax: the largest score so far, the sum of exp(score - top), and that sum weighted with values."""

    top: Float[Array, "*queries"]
    total: Float[Array, "*queries"]
    weighted: Float[Array, "*queries head_dim"]


def accumulation_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype sums are kept in: float32, or float64 for float64 inputs."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def precision(dtype: jnp.dtype) -> lax.Precision:
    """Of matmuls: float32 means float32, which matrix units would else round to TF32 or bfloat16."""
    return lax.Precision.HIGHEST if dtype in (jnp.float32, jnp.float64) else lax.Precision.DEFAULT


def rope_table(positions: Int[Array, "tokens"], rope: Float[Array, "half_rotary"], rope_scale: float) -> Float[Array, "tokens rotary"]:
    """Cosines, then sines, of position * inverse frequency, times rope_scale; 0 for padding tokens (position -1).

    The mask over both halves at once earns its place: without it XLA fuses the trigonometry into every layer's rotation and computes
    it again for every head (on a CPU six times the cost at 16 tokens and more).
    """
    angles = positions[:, None].astype(rope.dtype) * rope[None, :]
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1) * rope_scale
    return jnp.where((positions >= 0)[:, None], waves, 0)


def rotate(x: Float[Array, "tokens heads head_dim"], table: Float[Array, "tokens rotary"]) -> Float[Array, "tokens heads head_dim"]:
    """Rotary position embedding in the half-split form of Hugging Face's Llama (Su et al., arXiv 2104.09864).

    Rotates the first `rotary` features and leaves the others; products are in the table's dtype, the result has x's.
    """
    half = table.shape[1] // 2
    cos, sin = table[:, None, :half], table[:, None, half:]
    first, second = x[..., :half].astype(table.dtype), x[..., half : 2 * half].astype(table.dtype)
    parts = [(first * cos - second * sin).astype(x.dtype), (second * cos + first * sin).astype(x.dtype), x[..., 2 * half :]]
    return jnp.concatenate(parts, axis=-1)


def shape_scores(products: Float[Array, "*shape"], spec: AttentionSpec) -> Float[Array, "*shape"]:
    """Scale and soft cap of raw q.k products."""
    scores = products * spec.scale
    return scores if spec.soft_cap is None else spec.soft_cap * jnp.tanh(scores / spec.soft_cap)


def blank(like: Float[Array, "..."], shape: tuple[int, ...], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Zeros to start a loop with: under shard_map they vary over the mesh axes that `like` varies over, as the loop's results will."""
    seed = like.reshape(-1)[0]
    return jnp.broadcast_to(jnp.where(seed == seed, 0, 0).astype(dtype), shape)


def start(like: Float[Array, "*queries head_dim"], sinks: Float[Array, "..."] | None) -> Running:
    """The state before any key, shaped like the queries.

    sinks broadcast to the queries: a sink is a score that takes its share of the softmax and brings no value (GPT-OSS), so it is
    where the running sum starts.
    """
    wide = accumulation_dtype(like.dtype)
    zeros = blank(like, like.shape, wide)
    none = zeros[..., 0]
    if sinks is None:
        return Running(none + LOWEST, none, zeros)
    return Running(none + jnp.broadcast_to(sinks.astype(wide), none.shape), none + 1, zeros)


def absorb(
    state: Running,
    scores: Float[Array, "*queries keys"],
    visible: Bool[Array, "..."],
    weigh: Callable[[Float[Array, "*queries keys"]], Float[Array, "*queries head_dim"]],
) -> Running:
    """One block of keys enters the online softmax (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135).

    visible has scores' rank and broadcasts to it; weigh turns weights over keys into weighted sums of values.
    """
    top = jnp.maximum(state.top, jnp.max(jnp.where(visible, scores, LOWEST), axis=-1))
    weights = jnp.where(visible, jnp.exp(scores - top[..., None]), 0)
    decay = jnp.exp(state.top - top)
    return Running(top, state.total * decay + jnp.sum(weights, axis=-1), state.weighted * decay[..., None] + weigh(weights))


def finish(state: Running) -> Float[Array, "*queries head_dim"]:
    """Weighted mean of the values; 0 for a query that saw no key."""
    return state.weighted / jnp.where(state.total > 0, state.total, 1)[..., None]
