"""A quantised weight, its description, and the slow twin that says what it means.

Invariants of a `QArray` (`check` tests them on a concrete one):

1. values is int8 with shape [out.., in..] and lies in [-127, 127]: -128 never occurs, so negation is exact.
2. scales is float32 with shape [out..]: one finite, positive number for each output channel.
3. The weight is values * scales, the scale broadcast over the trailing (contracted) dimensions: `dequantize`.

Model files see a weight; whether it is an array or a `QArray` is decided when a graph is made. This file knows no scheme.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8

from jaxinfer.sharding import ArraySpec

LIMIT = 127


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class QArray:
    """int8 values with one scale per output channel; see the invariants above."""

    values: Int8[Array, "..."]
    scales: Float32[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this stands for."""
        return self.values.shape

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], None]:
        """Leaves in the order values, scales."""
        key = jax.tree_util.GetAttrKey
        return ((key("values"), self.values), (key("scales"), self.scales)), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: tuple[Any, Any]) -> QArray:
        """Rebuilt without checks: jax puts other things than arrays in here while it transforms."""
        self = object.__new__(cls)
        object.__setattr__(self, "values", leaves[0])
        object.__setattr__(self, "scales", leaves[1])
        return self


@dataclass(frozen=True)
class QSpec:
    """A quantised weight before it exists: what its two arrays look like, and the scheme (a file of this folder) that makes them."""

    values: ArraySpec
    scales: ArraySpec
    scheme: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this stands for."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.values.nbytes + self.scales.nbytes


def dequantize(weight: QArray) -> Float32[Array, "..."]:
    """The weight that a QArray stands for, in float32: the oracle for every fast path."""
    trailing = weight.values.ndim - weight.scales.ndim
    return weight.values.astype(jnp.float32) * jnp.expand_dims(weight.scales, tuple(range(-trailing, 0)))


def check(weight: QArray) -> None:
    """Test the invariants on a concrete QArray.

    Raises:
        ValueError: naming the invariant that does not hold.
    """
    values, scales = np.asarray(weight.values), np.asarray(weight.scales)
    if values.dtype != np.int8 or scales.dtype != np.float32:
        raise ValueError(f"a QArray holds int8 values and float32 scales, found {values.dtype} and {scales.dtype}")
    if not 0 < scales.ndim < values.ndim or values.shape[: scales.ndim] != scales.shape:
        raise ValueError(f"scales {scales.shape} are not the leading dimensions of values {values.shape}")
    if values.size and values.min() < -LIMIT:
        raise ValueError("values holds -128, which no scheme produces")
    if not (np.isfinite(scales).all() and (scales > 0).all()):
        raise ValueError("scales must be finite and positive")


def relative_error(weight: QArray, exact: Float[Array, "..."]) -> float:
    """Root mean square of dequantize(weight) - exact over that of exact; 0 for an exact that is all zero and is met."""
    difference = dequantize(weight) - exact.astype(jnp.float32)
    reference = float(jnp.sqrt(jnp.mean(jnp.square(exact.astype(jnp.float32)))))
    return float(jnp.sqrt(jnp.mean(jnp.square(difference)))) / (reference or 1.0)
