"""The root mean square norm (Zhang and Sennrich, arXiv 1910.07467), as every op that has one means it."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.attention import accumulation_dtype


def rms_norm(
    x: Float[Array, "tokens *heads features"], weight: Float[Array, "features"], *, epsilon: float, offset: float
) -> Float[Array, "tokens *heads features"]:
    """x / rms(x) * (weight + offset) over the last dimension: computed in float32 (float64 for float64).

    Where offset is 0 the normalised x is rounded before the weight multiplies it, else the product is rounded once.
    """
    wide = x.astype(accumulation_dtype(x.dtype))
    scaled = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    weight = jnp.expand_dims(weight, tuple(range(x.ndim - 1)))
    if offset:
        return (scaled * (weight.astype(wide.dtype) + offset)).astype(x.dtype)
    return scaled.astype(x.dtype) * weight
