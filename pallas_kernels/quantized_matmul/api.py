"""Matmul of activations with quantised weights: 8 or 4 bits each, with a scale for each block of a row, or of several rows.

Weights are stored [out, in], as the fast kernels read them, and stay as they are in memory: int8, float8_e4m3fn, or uint8 with two
numbers from 0 to 15 in a byte, the even input in the low half. Knows nothing of how they were quantised.
"""

from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped, UInt8

from pallas_kernels import dispatch
from pallas_kernels.checks import describe, require, require_dtype, require_shape
from pallas_kernels.quantized_matmul.formats import PACKED, Format

OP = "quantized_matmul"


def quantized_matmul(
    x: Float[Array, "tokens in"],
    weight: Shaped[Array, "out stored"],
    scales: Float[Array, "outs ins"],
    *,
    zeros: UInt8[Array, "outs ins"] | None = None,
    activations: Literal["float", "int8"] = "float",
    out_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> Float[Array, "tokens out"]:
    """x @ ((weight - zeros) * scales).T, summed and scaled in float32 and rounded once, to out_dtype (None: x's).

    scales has a number for each of equal blocks of the weight: [out, 1] one per output channel, [out, in / 64] one per 64 inputs of a
    channel, [out / 128, in / 128] one per tile. zeros, for 4 bits only, has the same shape; None is 8. activations "int8": x is first
    rounded to int8 with the scale max|x| / 127 of each token (LLM.int8, arXiv 2208.07339; SmoothQuant, arXiv 2211.10438).

    Raises ValueError when shapes or dtypes do not fit together.
    """
    check(x, weight, scales, zeros, activations)
    known = Format.of(weight, scales, activations).key(x, weight)
    module = dispatch.resolve(OP, implementation, dispatch.target(), known)
    dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    return module.quantized_matmul(x, weight, scales, zeros=zeros, activations=activations, out_dtype=dtype)


def check(x: Array, weight: Array, scales: Array, zeros: Array | None = None, activations: str = "float") -> None:
    """Refuse arguments that do not fit together (ValueError)."""
    require(x.ndim == 2, OP, f"x is {describe(x)}", "it must have shape [tokens, in]; flatten leading dimensions")
    require(jnp.issubdtype(x.dtype, jnp.floating), OP, f"x is {describe(x)}", "it must be of a floating dtype")
    require(weight.ndim == 2, OP, f"weight is {describe(weight)}", "it must have shape [out, in]; flatten the output dimensions")
    kinds = (jnp.int8, jnp.float8_e4m3fn, PACKED)
    require(weight.dtype in kinds, OP, f"weight is {describe(weight)}", "it must be int8, float8_e4m3fn or uint8 (two of 4 bits in a byte)")
    outputs, features, packed = weight.shape[0], x.shape[1], weight.dtype == PACKED
    require(not packed or features % 2 == 0, OP, f"x is {describe(x)}", "weights of 4 bits need an even number of inputs")
    meaning = "out, in / 2: two inputs in a byte" if packed else "out, in; weights are stored transposed"
    require_shape(OP, "weight", weight, (outputs, features // 2 if packed else features), meaning)
    require(jnp.issubdtype(scales.dtype, jnp.floating), OP, f"scales is {describe(scales)}", "it must be of a floating dtype")
    whole = scales.ndim == 2 and min(scales.shape) > 0 and outputs % scales.shape[0] == 0 and features % scales.shape[1] == 0
    equal = f"it must cut a weight [{outputs}, {features}] into equal blocks; [{outputs}, 1] is one per row"
    require(whole, OP, f"scales is {describe(scales)}", equal)
    even = not packed or features // scales.shape[1] % 2 == 0
    require(even, OP, f"scales is {describe(scales)}", "blocks of 4-bit weights must have an even number of inputs")
    if zeros is not None:
        require(packed, OP, f"zeros is {describe(zeros)}", "it belongs to weights of 4 bits only")
        require_shape(OP, "zeros", zeros, scales.shape, "that of scales")
        require_dtype(OP, "zeros", zeros, PACKED, "0 to 16")
    require(activations in ("float", "int8"), OP, f"activations is {activations!r}", "it must be 'float' or 'int8'")
