"""What the matmul means: in float32, or the inputs' own wider precision."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.attention import accumulation_dtype


def dense_matmul(
    x: Float[Array, "tokens in"], weight: Float[Array, "out in"], *, out_dtype: DTypeLike | None = None
) -> Float[Array, "tokens out"]:
    """See api.dense_matmul."""
    wide = accumulation_dtype(x.dtype)
    return jnp.matmul(x.astype(wide), weight.astype(wide).T, precision="highest").astype(x.dtype if out_dtype is None else out_dtype)
