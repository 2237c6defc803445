"""What a chain means: its links one by one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.attention import accumulation_dtype
from pallas_kernels.norm import rms_norm


class Form(NamedTuple):
    """What is static of a link: whether it is gated, and of its norm, if it has one, what is added to the mean square and to the weight."""

    gated: bool = False
    epsilon: float = 1e-6
    offset: float = 0.0


def token_chain(
    x: Float[Array, "1 in"],
    held: Float[Array, "1 features"],
    weights: Sequence[Shaped[Array, "_ _"]],
    scales: Sequence[Float[Array, "_ 1"] | None],
    norms: Sequence[Float[Array, "_"] | None],
    *,
    forms: tuple[Form, ...],
    counters: Any = None,
) -> tuple[Array, Array]:
    """See api.token_chain; counters are for kernels."""
    del counters
    value, total = x, held
    for weight, scale, norm, form in zip(weights, scales, norms, forms, strict=True):
        if norm is not None:
            total = total + value
            value = rms_norm(total, norm, epsilon=form.epsilon, offset=form.offset)
        value = matmul(value, weight, scale)
        value = gated(value) if form.gated else value
    return value, total


def matmul(x: Float[Array, "1 in"], weight: Shaped[Array, "out in"], scale: Float[Array, "out 1"] | None) -> Float[Array, "1 out"]:
    """x @ (weight * scale).T, summed wide, rounded once."""
    wide = accumulation_dtype(x.dtype)
    product = jnp.matmul(x.astype(wide), weight.astype(wide).T, precision="highest")
    return (product if scale is None else product * scale.astype(wide).T).astype(x.dtype)


def gated(value: Float[Array, "1 both"]) -> Float[Array, "1 half"]:
    """silu(first half) * second half (Shazeer, arXiv 2002.05202), rounded once."""
    gate, up = jnp.split(value.astype(accumulation_dtype(value.dtype)), 2, axis=1)
    return (gate / (1 + jnp.exp(-gate)) * up).astype(value.dtype)
