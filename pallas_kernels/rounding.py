"""Activations rounded to int8, token by token, as every op that does so means it (LLM.int8, arXiv 2208.07339)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

LIMIT = 127


class Tokens(NamedTuple):
    """Activations as int8 and the scale of each token."""

    values: Int8[Array, "tokens in"]
    scales: Float32[Array, "tokens 1"]


def round_tokens(x: Float[Array, "tokens in"]) -> Tokens:
    """Each token to int8, in float32 whatever x's dtype: scale = max|token| / 127, to nearest, ties to even; scale 1 for zeros,
    and what is not finite leaves a scale that is not."""
    wide = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(wide), axis=1, keepdims=True)
    visible = jnp.sum(wide * 0, axis=1, keepdims=True)  # NaN where a number is not finite: the largest on a CPU may leave it out
    scales = jnp.where(top == 0, 1, jnp.maximum(top / LIMIT, jnp.finfo(jnp.float32).tiny)) + visible
    return Tokens(jnp.clip(jnp.rint(wide / scales), -LIMIT, LIMIT).astype(jnp.int8), scales)
