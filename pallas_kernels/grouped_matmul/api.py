"""Matmul of rows that lie sorted by group, each group with a weight of its own: the experts of a mixture.

Weights are stored [groups, out, in]; 8-bit ones (int8, float8_e4m3fn) have a scale for each output channel. Group sizes are known on the
device only. Knows no routing, no layers and no mesh.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels import dispatch
from pallas_kernels.checks import describe, require, require_dtype, require_shape

OP = "grouped_matmul"
CODES = ("int8", "float8_e4m3fn")


def grouped_matmul(
    x: Float[Array, "rows in"],
    weight: Shaped[Array, "groups out in"],
    sizes: Int32[Array, "groups"],
    *,
    scales: Float[Array, "groups out"] | None = None,
    out_dtype: DTypeLike | None = None,
    implementation: str = "auto",
) -> Float[Array, "rows out"]:
    """Each row times its group's weight, transposed: the first sizes[0] rows are group 0's, the next sizes[1] group 1's, and so on.

    Groups may be empty; rows after the last group give zeros; sizes that are negative or add up to more than there are rows are not
    looked at and give undefined rows. Summed and scaled in float32 and rounded once, to out_dtype (None: x's).

    Raises ValueError when shapes or dtypes do not fit together.
    """
    check(x, weight, sizes, scales)
    module = dispatch.resolve(OP, implementation, dispatch.target(), key(x, weight))
    return module.grouped_matmul(x, weight, sizes, scales=scales, out_dtype=jnp.dtype(x.dtype if out_dtype is None else out_dtype))


def key(x: Float[Array, "rows in"], weight: Shaped[Array, "groups out in"]) -> dispatch.Key:
    """What sizes of blocks are looked up by."""
    groups, outputs, features = weight.shape
    return {"rows": x.shape[0], "groups": groups, "in": features, "out": outputs, "dtype": x.dtype.name, "weight": weight.dtype.name}


def check(x: Array, weight: Array, sizes: Array, scales: Array | None = None) -> None:
    """Refuse arguments that do not fit together (ValueError)."""
    require(x.ndim == 2, OP, f"x is {describe(x)}", "it must have shape [rows, in]; flatten leading dimensions")
    require(jnp.issubdtype(x.dtype, jnp.floating), OP, f"x is {describe(x)}", "it must be of a floating dtype")
    require(weight.ndim == 3 and weight.shape[0] > 0, OP, f"weight is {describe(weight)}", "it must have shape [groups, out, in]")
    groups, outputs = weight.shape[:2]
    require_shape(OP, "weight", weight, (groups, outputs, x.shape[1]), "groups, out, in; weights are stored transposed")
    require_shape(OP, "sizes", sizes, (groups,), "rows of each group")
    require_dtype(OP, "sizes", sizes, jnp.int32, "rows of each group")
    if scales is None:
        require_dtype(OP, "weight", weight, x.dtype, f"that of x, or {' or '.join(CODES)} with scales")
        return
    require(weight.dtype.name in CODES, OP, f"weight is {describe(weight)}", f"with scales it must be {' or '.join(CODES)}")
    require_shape(OP, "scales", scales, (groups, outputs), "one for each output channel of each group")
    require(jnp.issubdtype(scales.dtype, jnp.floating), OP, f"scales is {describe(scales)}", "it must be of a floating dtype")
