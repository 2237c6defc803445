"""What is added to the residual stream and the norm of the sum, in one call: signature, checks, and the choice of an implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.checks import describe, require, require_dtype, require_shape
from pallas_kernels.residual_norm.reference import Normed

OP = "residual_norm"


def residual_norm(
    x: Float[Array, "tokens features"],
    added: Float[Array, "tokens features"] | None,
    weight: Float[Array, "features"],
    *,
    epsilon: float,
    offset: float = 0.0,
    implementation: str = "auto",
) -> Normed:
    """The sum x + added (None: x), rounded to x's dtype, and its root mean square norm (Zhang and Sennrich, arXiv 1910.07467) in x's dtype.

    The norm is computed in float32 (float64 for float64) from the rounded sum. offset is added to the weight; where it is 0 the normalised
    sum is rounded before the weight multiplies it, else the product is rounded once. A token's result depends on that token, the weight and
    the static shapes alone. Raises ValueError when shapes or dtypes do not fit.
    """
    check(x, added, weight)
    module = dispatch.resolve(OP, implementation, dispatch.target(), key_of(x, added))
    return module.residual_norm(x, added, weight, epsilon=epsilon, offset=offset)


def key_of(x: Float[Array, "tokens features"], added: Float[Array, "tokens features"] | None) -> dispatch.Key:
    """What there is to know of a call."""
    return {"tokens": x.shape[0], "features": x.shape[1], "dtype": x.dtype.name, "added": "nothing" if added is None else "given"}


def check(x: Array, added: Array | None, weight: Array) -> None:
    """Refuse arguments that do not fit together (ValueError)."""
    require(x.ndim == 2, OP, f"x is {describe(x)}", "it must have shape [tokens, features]; flatten leading dimensions")
    require(jnp.issubdtype(x.dtype, jnp.floating), OP, f"x is {describe(x)}", "it must be of a floating dtype")
    require(x.shape[1] > 0, OP, f"x is {describe(x)}", "there is no norm of nothing")
    require_shape(OP, "weight", weight, x.shape[1:], "features")
    require_dtype(OP, "weight", weight, x.dtype, "that of x")
    if added is not None:
        require_shape(OP, "added", added, x.shape, "tokens, features")
        require_dtype(OP, "added", added, x.dtype, "that of x")
