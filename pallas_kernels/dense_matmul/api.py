"""Matmul of activations with weights that are stored [out, in], as decoding wants it: few tokens, so that reading the weight is the cost.

Knows no layers, no mesh and no quantisation.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.checks import describe, require, require_dtype, require_shape

OP = "dense_matmul"


def dense_matmul(
    x: Float[Array, "tokens in"], weight: Float[Array, "out in"], *, out_dtype: DTypeLike | None = None, implementation: str = "auto"
) -> Float[Array, "tokens out"]:
    """x @ weight.T, summed in float32 (float64 for float64) and rounded once, to out_dtype (None: x's). float32 is not rounded to TF32.

    A token's result depends on that token, the weight and the static shapes alone. Raises ValueError when shapes or dtypes do not fit.
    """
    check(x, weight)
    known: dispatch.Key = {"tokens": x.shape[0], "in": weight.shape[1], "out": weight.shape[0], "dtype": x.dtype.name}
    module = dispatch.resolve(OP, implementation, dispatch.target(), known)
    return module.dense_matmul(x, weight, out_dtype=jnp.dtype(x.dtype if out_dtype is None else out_dtype))


def check(x: Array, weight: Array) -> None:
    """Refuse arguments that do not fit together (ValueError)."""
    require(x.ndim == 2, OP, f"x is {describe(x)}", "it must have shape [tokens, in]; flatten leading dimensions")
    require(jnp.issubdtype(x.dtype, jnp.floating), OP, f"x is {describe(x)}", "it must be of a floating dtype")
    require(weight.ndim == 2, OP, f"weight is {describe(weight)}", "it must have shape [out, in]; flatten the output dimensions")
    require_shape(OP, "weight", weight, (weight.shape[0], x.shape[1]), "out, in; weights are stored transposed")
    require_dtype(OP, "weight", weight, x.dtype, "that of x")
