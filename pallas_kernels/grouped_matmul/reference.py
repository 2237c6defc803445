"""What the grouped matmul means: in float32, or the inputs' own wider precision; every row meets every weight, and keeps one product."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.attention import accumulation_dtype


def grouped_matmul(
    x: Float[Array, "rows in"],
    weight: Shaped[Array, "groups out in"],
    sizes: Int[Array, "groups"],
    *,
    scales: Float[Array, "groups out"] | None = None,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "rows out"]:
    """See api.grouped_matmul."""
    wide = accumulation_dtype(x.dtype)
    products = jnp.einsum("ri,goi->gro", x.astype(wide), weight.astype(wide), precision="highest")
    scaled = products if scales is None else products * scales.astype(wide)[:, None]
    end = jnp.cumsum(sizes)[:, None]
    row = jnp.arange(x.shape[0], dtype=sizes.dtype)[None]
    mine = (end - sizes[:, None] <= row) & (row < end)
    return jnp.sum(jnp.where(mine[..., None], scaled, 0), axis=0).astype(x.dtype if out_dtype is None else out_dtype)
