"""What the sum and its norm mean."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.attention import accumulation_dtype


class Normed(NamedTuple):
    """The sum and its norm; `normed` first, for what is compared first."""

    normed: Float[Array, "tokens features"]
    total: Float[Array, "tokens features"]


def rms_norm(
    x: Float[Array, "tokens *heads features"], weight: Float[Array, "features"], *, epsilon: float, offset: float
) -> Float[Array, "tokens *heads features"]:
    """x / rms(x) * (weight + offset) over the last dimension: see api.residual_norm."""
    wide = x.astype(accumulation_dtype(x.dtype))
    scaled = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    weight = jnp.expand_dims(weight, tuple(range(x.ndim - 1)))
    if offset:
        return (scaled * (weight.astype(wide.dtype) + offset)).astype(x.dtype)
    return scaled.astype(x.dtype) * weight


def residual_norm(
    x: Float[Array, "tokens features"],
    added: Float[Array, "tokens features"] | None,
    weight: Float[Array, "features"],
    *,
    epsilon: float,
    offset: float = 0.0,
) -> Normed:
    """See api.residual_norm."""
    total = x if added is None else x + added
    return Normed(rms_norm(total, weight, epsilon=epsilon, offset=offset), total)
