"""What a chain means: its links one by one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from pallas_kernels.attention import accumulation_dtype
from pallas_kernels.norm import rms_norm
from pallas_kernels.rounding import round_tokens


class Form(NamedTuple):
    """What is static of a link: whether it is gated, and of its norm, if it has one, what is added to the mean square and to the weight."""

    gated: bool = False
    epsilon: float = 1e-6
    offset: float = 0.0


class Weight(NamedTuple):
    """A weight as stored, with a scale for each output if it is int8; smooth: what its inputs are multiplied by first, if anything."""

    values: Shaped[Array, "out in"]
    scales: Float[Array, "out 1"] | None = None
    smooth: Float[Array, "in"] | None = None


def token_chain(
    x: Float[Array, "tokens in"],
    held: Float[Array, "tokens features"],
    weights: Sequence[Weight],
    norms: Sequence[Float[Array, "_"] | None],
    *,
    forms: tuple[Form, ...],
    activations: str = "float",
    counters: Any = None,
) -> tuple[Array, Array]:
    """See api.token_chain; counters are for kernels."""
    del counters
    value, total = x, held
    for weight, norm, form in zip(weights, norms, forms, strict=True):
        if norm is not None:
            total = total + value
            value = rms_norm(total, norm, epsilon=form.epsilon, offset=form.offset)
        value = matmul(value, weight, activations)
        value = gated(value) if form.gated else value
    return value, total


def matmul(x: Float[Array, "tokens in"], weight: Weight, activations: str = "float") -> Float[Array, "tokens out"]:
    """x * smooth, rounded first where activations are int8, @ (values * scales).T, summed wide, rounded once."""
    inputs = x if weight.smooth is None else x * weight.smooth[None].astype(x.dtype)
    wide, size = accumulation_dtype(x.dtype), None
    if activations == "int8":
        inputs, size = round_tokens(inputs)
    product = jnp.matmul(inputs.astype(wide), weight.values.astype(wide).T, precision="highest")
    product = product if size is None else product * size.astype(wide)
    return (product if weight.scales is None else product * weight.scales.astype(wide).T).astype(x.dtype)


def gated(value: Float[Array, "tokens both"]) -> Float[Array, "tokens half"]:
    """silu(first half) * second half (Shazeer, arXiv 2002.05202), rounded once."""
    gate, up = jnp.split(value.astype(accumulation_dtype(value.dtype)), 2, axis=1)
    return (gate / (1 + jnp.exp(-gate)) * up).astype(value.dtype)
