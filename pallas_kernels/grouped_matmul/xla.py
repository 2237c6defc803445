"""The grouped matmul in plain XLA: its ragged dot for weights of x's dtype; group after group for 8-bit ones.

XLA's ragged dot is a kernel of its own on TPUs; elsewhere it is one dot of all rows with all weights, rows of other groups made zero. Of
8-bit weights only one group's are converted at a time, and those of a group without rows are not read.
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels.attention import accumulation_dtype, blank, precision

NUMBERS = lax.RaggedDotDimensionNumbers(dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0])


def grouped_matmul(
    x: Float[Array, "rows in"],
    weight: Shaped[Array, "groups out in"],
    sizes: Int32[Array, "groups"],
    *,
    scales: Float[Array, "groups out"] | None = None,
    out_dtype: DTypeLike,
) -> Float[Array, "rows out"]:
    """See api.grouped_matmul."""
    wide = accumulation_dtype(x.dtype)
    if not x.shape[0]:
        return jnp.zeros((0, weight.shape[1]), out_dtype)
    if scales is None:
        out = lax.ragged_dot_general(x, weight, sizes, NUMBERS, precision=precision(x.dtype), preferred_element_type=wide)
        return jnp.where(jnp.arange(x.shape[0], dtype=jnp.int32)[:, None] < jnp.sum(sizes), out, 0).astype(out_dtype)
    ends, row = jnp.cumsum(sizes), jnp.arange(x.shape[0], dtype=jnp.int32)

    def group(number: Int32[Array, ""], out: Float[Array, "rows out"]) -> Float[Array, "rows out"]:
        def meet() -> Float[Array, "rows out"]:
            own = lax.dynamic_index_in_dim(weight, number, keepdims=False).astype(x.dtype)
            sums = lax.dot_general(x, own, (((1,), (1,)), ((), ())), precision=precision(x.dtype), preferred_element_type=wide)
            scaled = sums * lax.dynamic_index_in_dim(scales, number).astype(wide)
            mine = (row >= ends[number] - sizes[number]) & (row < ends[number])
            return jnp.where(mine[:, None], scaled.astype(out.dtype), out)

        return lax.cond(sizes[number] > 0, meet, lambda: out)

    start = blank(x, (x.shape[0], weight.shape[1]), jnp.dtype(out_dtype))
    return lax.fori_loop(jnp.int32(0), jnp.int32(weight.shape[0]), group, start)
