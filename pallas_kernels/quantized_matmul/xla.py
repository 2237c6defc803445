"""The quantised matmul in plain XLA: int8 converted on the way into the dot, scales applied to the sums."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels.attention import accumulation_dtype


def quantized_matmul(
    x: Float[Array, "tokens in"], weight: Int8[Array, "out in"], scales: Float[Array, "out"]
) -> Float[Array, "tokens out"]:
    """See api.quantized_matmul."""
    wide = accumulation_dtype(x.dtype)
    sums = jnp.einsum("ti,oi->to", x, weight.astype(x.dtype), preferred_element_type=wide)
    return (sums * scales.astype(wide)[None]).astype(x.dtype)
