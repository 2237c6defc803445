"""The one way the ops refuse arguments: a ValueError naming the op, what was found and what to do about it."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def require(holds: bool, op: str, problem: str, remedy: str) -> None:
    """Raise ValueError("op: problem; remedy") unless holds."""
    if not holds:
        raise ValueError(f"{op}: {problem}; {remedy}")


def describe(array: Array) -> str:
    """Dtype and shape in one word, as in bfloat16[8, 64]."""
    return f"{jnp.dtype(array.dtype).name}{list(array.shape)}"


def require_shape(op: str, name: str, array: Array, shape: tuple[int, ...], meaning: str) -> None:
    """Refuse an array whose shape is not `shape`; meaning names the dimensions in words."""
    require(tuple(array.shape) == shape, op, f"{name} is {describe(array)}", f"it must have shape {list(shape)} ({meaning})")


def require_dtype(op: str, name: str, array: Array, dtype: Any, why: str) -> None:
    """Refuse an array of another dtype; why says where the dtype comes from."""
    remedy = f"it must be {jnp.dtype(dtype).name} ({why}); cast it before the call"
    require(array.dtype == dtype, op, f"{name} is {describe(array)}", remedy)
