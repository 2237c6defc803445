"""What the quantised matmul means: the weights it stands for, and a matmul, in float32 or the inputs' own wider precision."""

from jaxtyping import Array, Float, Int8

from pallas_kernels.attention import accumulation_dtype


def quantized_matmul(
    x: Float[Array, "tokens in"], weight: Int8[Array, "out in"], scales: Float[Array, "out"]
) -> Float[Array, "tokens out"]:
    """See api.quantized_matmul."""
    wide = accumulation_dtype(x.dtype)
    return (x.astype(wide) @ (weight.astype(wide) * scales.astype(wide)[:, None]).T).astype(x.dtype)
