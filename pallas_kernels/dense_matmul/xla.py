"""The matmul in plain XLA, in the form that the platform's compiler makes most of.

One dot that contracts the last dimensions, except where another form of the same sums was measured to be faster.
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.attention import accumulation_dtype, precision

HALVED_TOKENS = 16


def dense_matmul(x: Float[Array, "tokens in"], weight: Float[Array, "out in"], *, out_dtype: DTypeLike) -> Float[Array, "tokens out"]:
    """See api.dense_matmul. The dot's own result dtype is out_dtype: matrix units accumulate in float32 anyway."""
    platform = dispatch.target().platform
    if platform == "gpu" and x.shape[0] == 1:
        return _row_sums(x, weight, out_dtype)
    if platform == "cpu" and 1 < x.shape[0] <= HALVED_TOKENS and weight.shape[0] % 2 == 0:
        return _in_halves(x, weight, out_dtype)
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=precision(x.dtype), preferred_element_type=out_dtype)


def _row_sums(x: Float[Array, "one in"], weight: Float[Array, "out in"], out_dtype: DTypeLike) -> Float[Array, "one out"]:
    """The product for one token as sums over the weight's rows: XLA on GPUs reads it at the memory's rate, which its dots do not."""
    wide = accumulation_dtype(x.dtype)
    return jnp.sum(x.astype(wide) * weight.astype(wide), axis=1).astype(out_dtype)[None]


def _in_halves(x: Float[Array, "tokens in"], weight: Float[Array, "out in"], out_dtype: DTypeLike) -> Float[Array, "tokens out"]:
    """The same product as a batch of two with the weight on the left: for a few tokens XLA on CPUs is 1.1 to 1.7 times as fast at that."""
    halves, twice = weight.reshape(2, -1, weight.shape[1]), jnp.broadcast_to(x[None], (2, *x.shape))
    dimensions = ((2,), (2,)), ((0,), (0,))
    product = lax.dot_general(halves, twice, dimensions, precision=precision(x.dtype), preferred_element_type=out_dtype)
    return product.reshape(-1, x.shape[0]).T
