"""The one matmul of activations with weights: picks the arithmetic by what the weight is, so that model files need not know.

Weights are [out.., in..] and are never transposed or reshaped across a sharded dimension boundary that is not the leading one.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinfer.quant.qarray import QArray
from pallas_kernels import quantized_matmul


def matmul(
    x: Float[Array, "tokens *into"], weight: Array | QArray, *, out_dtype: np.dtype, implementation: str = "auto"
) -> Float[Array, "tokens *out"]:
    """Sum x over its dimensions after the first against the weight's trailing ones; float32 accumulation, result in out_dtype."""
    if isinstance(weight, QArray):
        return _quantized(x, weight, out_dtype, implementation)
    return _dense(x, weight, out_dtype)


def _dense(x: Array, weight: Array, out_dtype: np.dtype) -> Array:
    """The dot's own result dtype is out_dtype: units accumulate in float32 anyway, and a sharded sum then travels in out_dtype."""
    contracting = x.ndim - 1
    into_x, into_weight = tuple(range(1, x.ndim)), tuple(range(weight.ndim - contracting, weight.ndim))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(x, weight, ((into_x, into_weight), ((), ())), precision=precision, preferred_element_type=out_dtype)


def _quantized(x: Array, weight: QArray, out_dtype: np.dtype, implementation: str) -> Array:
    out_shape, tokens = weight.scales.shape, x.shape[0]
    into = math.prod(x.shape[1:])
    wide = x.astype(out_dtype) if jnp.dtype(out_dtype).itemsize > x.dtype.itemsize else x
    flat = quantized_matmul(
        wide.reshape(tokens, into), weight.values.reshape(-1, into), weight.scales.reshape(-1), implementation=implementation
    )
    return flat.reshape(tokens, *out_shape).astype(out_dtype)
