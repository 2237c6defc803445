"""What the quantised matmul means: the weights it stands for, and a matmul, in float32 or the inputs' own wider precision."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt8

from pallas_kernels.attention import accumulation_dtype
from pallas_kernels.quantized_matmul.formats import PACKED, ZERO, halves, spread
from pallas_kernels.rounding import round_tokens


def quantized_matmul(
    x: Float[Array, "tokens in"],
    weight: Shaped[Array, "out stored"],
    scales: Float[Array, "outs ins"],
    *,
    zeros: UInt8[Array, "outs ins"] | None = None,
    activations: str = "float",
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "tokens out"]:
    """See api.quantized_matmul."""
    wide, shape = accumulation_dtype(x.dtype), (weight.shape[0], x.shape[1])
    inputs, values = x.astype(wide), weight.astype(wide)
    if activations == "int8":
        tokens = round_tokens(x)
        inputs = tokens.values.astype(wide) * tokens.scales.astype(wide)
    if weight.dtype == PACKED:
        values = jnp.stack(halves(weight), axis=-1).reshape(shape).astype(wide)
        values = values - (ZERO if zeros is None else spread(zeros, shape).astype(wide))
    dequantised = values * spread(scales, shape).astype(wide)
    return jnp.matmul(inputs, dequantised.T, precision="highest").astype(x.dtype if out_dtype is None else out_dtype)
