"""Matmul of activations with int8 weights that have one scale per output channel.

Weights are stored [out, in], as the fast kernels read them; they stay int8 in memory. Knows nothing of how they were quantised.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels import dispatch
from pallas_kernels.checks import describe, require, require_dtype, require_shape

OP = "quantized_matmul"


def quantized_matmul(
    x: Float[Array, "tokens in"],
    weight: Int8[Array, "out in"],
    scales: Float[Array, "out"],
    *,
    implementation: str = "auto",
) -> Float[Array, "tokens out"]:
    """x @ (weight * scales[:, None]).T in x's dtype, summed and scaled in float32 (weight-only int8: LLM.int8, arXiv 2208.07339).

    Raises ValueError when shapes or dtypes do not fit together.
    """
    check(x, weight, scales)
    module = dispatch.resolve(OP, implementation, dispatch.target())
    return module.quantized_matmul(x, weight, scales)


def check(x: Array, weight: Array, scales: Array) -> None:
    """Refuse arguments that do not fit together (ValueError)."""
    require(x.ndim == 2, OP, f"x is {describe(x)}", "it must have shape [tokens, in]; flatten leading dimensions")
    require(jnp.issubdtype(x.dtype, jnp.floating), OP, f"x is {describe(x)}", "it must be of a floating dtype")
    require(weight.ndim == 2, OP, f"weight is {describe(weight)}", "it must have shape [out, in]; flatten the output dimensions")
    require_shape(OP, "weight", weight, (weight.shape[0], x.shape[1]), "out, in; weights are stored transposed")
    require_dtype(OP, "weight", weight, jnp.int8, "values quantised to 8 bits")
    require_shape(OP, "scales", scales, (weight.shape[0],), "one per output channel")
    require(jnp.issubdtype(scales.dtype, jnp.floating), OP, f"scales is {describe(scales)}", "it must be of a floating dtype")
