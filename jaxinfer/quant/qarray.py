"""A quantised weight, its description, and the slow twin that says what it means.

Invariants of a `QArray` that stands for a weight of `shape` [out.., in..] (`check` tests them on a concrete one):

1. values has the weight's dtype in memory: int8; float8_e4m3fn, never NaN; or uint8 with two numbers of 4 bits (0 to 15), the even
   element of the last dimension in the low half, so that dimension is half as long as the weight's.
2. scales is floating, finite and not negative, with as many dimensions as the weight. Along each, its size divides the weight's: the
   weight is cut into equal blocks and a block has one scale (size 1: one block). [out.., 1..] is one scale for each output channel.
3. zeros is None or, for values of 4 bits, uint8 of scales' shape, 0 to 16: what stands for zero in each block. None means 8.
4. smooth is None or floating, finite and positive with shape [in..]: what inputs are multiplied by first (SmoothQuant, arXiv 2211.10438).
5. order is None or int32 [inputs], each of them once: which input every column multiplies, where columns of one block had to be put
   side by side (GPTQ's desc_act). It has no sharding and comes without smooth; the inputs of a matmul are taken in this order.
6. activations is "float", inputs are used as they are, or "int8", they are quantised token by token when they arrive.
7. The weight is (values - zeros) * scales * smooth, each repeated over what it stands for, its columns put back: `dequantize`.

Model files see a weight; whether it is an array or a `QArray` is decided when a graph is made. This file knows no scheme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Shaped, UInt8

from jaxinfer.quant.blocks import Blocks, counts
from jaxinfer.sharding import ArraySpec

Activations = Literal["float", "int8"]

INT8, FP8, PACKED = np.dtype(np.int8), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.uint8)
ZERO = 8  # of 4 bits, where no zeros are given
FIELDS = ("values", "scales", "zeros", "smooth", "order")


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class QArray:
    """Values with scales, and zeros, smooth and order where the scheme has them; see the invariants above."""

    values: Shaped[Array, "..."]
    scales: Float[Array, "..."]
    zeros: UInt8[Array, "..."] | None = None
    smooth: Float[Array, "..."] | None = None
    order: Int32[Array, " inputs"] | None = None
    activations: Activations = "float"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this stands for."""
        return shape_of(self.values.shape, self.values.dtype)

    @property
    def blocks(self) -> Blocks:
        """How much of the weight has one scale, along each dimension."""
        return tuple(size // count for size, count in zip(self.shape, self.scales.shape, strict=True))

    @property
    def units(self) -> tuple[int, ...]:
        """Into how many pieces each dimension may be cut at most, so that no block and no byte is."""
        return tuple(size // grain for size, grain in zip(self.shape, grain_of(self.shape, self.blocks, self.values.dtype), strict=True))

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Activations]:
        """Leaves in the order of FIELDS; without those that there are not."""
        return tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in FIELDS), self.activations

    @classmethod
    def tree_unflatten(cls, activations: Activations, leaves: Sequence[Any]) -> QArray:
        """Rebuilt without checks: jax puts other things than arrays in here while it transforms."""
        self = object.__new__(cls)
        for name, value in zip((*FIELDS, "activations"), (*leaves, activations), strict=True):
            object.__setattr__(self, name, value)
        return self


@dataclass(frozen=True)
class QSpec:
    """A quantised weight before it exists: what its arrays look like, and the scheme (a file of this folder) that makes them."""

    values: ArraySpec
    scales: ArraySpec
    scheme: str
    zeros: ArraySpec | None = None
    smooth: ArraySpec | None = None
    order: ArraySpec | None = None
    activations: Activations = "float"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this stands for."""
        return shape_of(self.values.shape, self.values.dtype)

    @property
    def blocks(self) -> Blocks:
        """How much of the weight has one scale, along each dimension."""
        return tuple(size // count for size, count in zip(self.shape, self.scales.shape, strict=True))

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays that there are, in the order of a QArray's leaves."""
        return tuple(array for name in FIELDS if (array := getattr(self, name)) is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays)

    def make(self, arrays: Sequence[Any]) -> QArray:
        """The QArray of these arrays, which stand in the order of `arrays`."""
        rest = iter(arrays)
        found = [None if getattr(self, name) is None else next(rest) for name in FIELDS]
        return QArray.tree_unflatten(self.activations, found)


def describe(
    spec: ArraySpec,
    contracting: int,
    blocks: Blocks,
    dtype: np.dtype,
    *,
    scheme: str,
    scale_dtype: Any = np.float32,
    extras: Sequence[Literal["zeros", "smooth", "order"]] = (),
    activations: Activations = "float",
) -> QSpec:
    """A weight [out.., in..] in values of dtype (INT8, FP8 or PACKED) and blocks with a scale each.

    Everything is sharded as the weight is, along dimensions with several blocks only where no block is cut; else it is replicated there.

    Raises:
        ValueError: a dimension that is not a whole number of blocks, or blocks that cut a byte of two values of 4 bits.
    """
    if np.dtype(dtype) == PACKED and blocks[-1] % 2:
        raise ValueError(f"blocks {blocks} of a weight of 4 bits cut bytes")
    number, grain = counts(spec.shape, blocks), grain_of(spec.shape, blocks, dtype)
    stored, axes = stored_shape(spec.shape, dtype), tuple(axis if n > 1 else None for axis, n in zip(spec.axes, number, strict=True))
    cut = (*grain[:-1], grain[-1] * stored[-1] // spec.shape[-1]) if spec.shape else ()
    values = ArraySpec(stored, np.dtype(dtype), spec.axes, cut if math.prod(cut) > 1 else ())
    scales = ArraySpec(number, np.dtype(scale_dtype), axes)
    zeros = ArraySpec(number, PACKED, axes) if "zeros" in extras else None
    into = slice(len(spec.shape) - contracting, None)
    smooth = ArraySpec(spec.shape[into], np.dtype(np.float32), spec.axes[into], spec_grain(grain[into])) if "smooth" in extras else None
    order = ArraySpec((math.prod(spec.shape[into]),), np.dtype(np.int32), (None,)) if "order" in extras else None
    return QSpec(values, scales, scheme, zeros, smooth, order, activations)


def spec_grain(grain: Blocks) -> Blocks:
    """As an ArraySpec writes it: nothing where nothing is bound together."""
    return grain if math.prod(grain) > 1 else ()


def stored_shape(shape: tuple[int, ...], dtype: Any) -> tuple[int, ...]:
    """Shape of the values of a weight.

    Raises:
        ValueError: values of 4 bits and an odd last dimension.
    """
    if np.dtype(dtype) != PACKED:
        return shape
    if shape[-1] % 2:
        raise ValueError(f"a weight of shape {shape} has no even last dimension, which two values of 4 bits in a byte need")
    return (*shape[:-1], shape[-1] // 2)


def shape_of(stored: tuple[int, ...], dtype: Any) -> tuple[int, ...]:
    """The inverse of `stored_shape`."""
    return (*stored[:-1], 2 * stored[-1]) if np.dtype(dtype) == PACKED else stored


def grain_of(shape: tuple[int, ...], blocks: Blocks, dtype: Any) -> Blocks:
    """What must stay together when a weight is cut: the block where there are several, the byte, else nothing."""
    grain = [block if block < size else 1 for size, block in zip(shape, blocks, strict=True)]
    if grain and np.dtype(dtype) == PACKED:
        grain[-1] = max(grain[-1], 2)
    return tuple(grain)


def unpack(values: UInt8[Array, "*shape half"]) -> UInt8[Array, "*shape whole"]:
    """Both halves of each byte, the low one first."""
    pairs = jnp.stack([values & 15, values >> 4], axis=-1)
    return pairs.reshape(*values.shape[:-1], 2 * values.shape[-1])


def dequantize(weight: QArray) -> Float32[Array, "..."]:
    """The weight that a QArray stands for, in float32: the oracle for every fast path."""

    def spread(per_block: Array) -> Array:
        for axis, block in enumerate(weight.blocks):
            per_block = jnp.repeat(per_block, block, axis=axis)
        return per_block.astype(jnp.float32)

    if weight.values.dtype == PACKED:
        zeros = jnp.float32(ZERO) if weight.zeros is None else spread(weight.zeros)
        values = unpack(weight.values).astype(jnp.float32) - zeros
    else:
        values = weight.values.astype(jnp.float32)
    scaled = values * spread(weight.scales)
    if weight.order is not None:
        scaled = scaled.reshape(-1, weight.order.size)[:, jnp.argsort(weight.order)].reshape(scaled.shape)
    return scaled if weight.smooth is None else scaled * jnp.broadcast_to(weight.smooth, scaled.shape).astype(jnp.float32)


def check(weight: QArray) -> None:
    """Test the invariants on a concrete QArray.

    Raises:
        ValueError: naming the invariant that does not hold.
    """
    values, scales = np.asarray(weight.values), np.asarray(weight.scales)
    if values.dtype not in (INT8, FP8, PACKED) or not jnp.issubdtype(scales.dtype, np.floating):
        raise ValueError(f"values are int8, float8_e4m3fn or packed in uint8 and scales floating, found {values.dtype} and {scales.dtype}")
    if scales.ndim != values.ndim or any(n < 1 or size % n for size, n in zip(weight.shape, scales.shape, strict=True)):
        raise ValueError(f"scales {scales.shape} do not cut a weight of shape {weight.shape} into equal blocks")
    if values.dtype == PACKED and weight.blocks[-1] % 2:
        raise ValueError(f"blocks {weight.blocks} of a weight of 4 bits cut bytes")
    if values.dtype == FP8 and np.isnan(values.astype(np.float32)).any():
        raise ValueError("values holds NaN")
    wide = scales.astype(np.float32)
    if not (np.isfinite(wide).all() and (wide >= 0).all()):
        raise ValueError("scales must be finite and not negative")
    _check_extras(weight)


def _check_extras(weight: QArray) -> None:
    if weight.activations not in ("float", "int8"):
        raise ValueError(f"activations is 'float' or 'int8', found {weight.activations!r}")
    if weight.zeros is not None:
        zeros = np.asarray(weight.zeros)
        if weight.values.dtype != PACKED or zeros.dtype != PACKED or zeros.shape != weight.scales.shape or zeros.max(initial=0) > 2 * ZERO:
            raise ValueError(f"zeros belong to values of 4 bits: uint8, 0 to 16, in scales' shape; found {zeros.dtype} {zeros.shape}")
    if weight.order is not None:
        _check_order(weight, np.asarray(weight.order))
    if weight.smooth is not None:
        smooth = np.asarray(weight.smooth, np.float32)
        if smooth.shape != weight.shape[len(weight.shape) - smooth.ndim :] or not (np.isfinite(smooth).all() and (smooth > 0).all()):
            raise ValueError(f"smooth is finite and positive, one for each input of {weight.shape}; found shape {smooth.shape}")


def _check_order(weight: QArray, order: np.ndarray) -> None:
    each_once = math.prod(weight.shape) % max(order.size, 1) == 0 and np.array_equal(np.sort(order), np.arange(order.size))
    if order.dtype != np.int32 or not each_once or weight.smooth is not None:
        found = f"{order.dtype} {order.shape}"
        raise ValueError(f"order is int32, each input of {weight.shape} once, and comes without smooth; found {found}")


def relative_error(weight: QArray, exact: Float[Array, "..."]) -> float:
    """Root mean square of dequantize(weight) - exact over that of exact; 0 for an exact that is all zero and is met."""
    difference = dequantize(weight) - exact.astype(jnp.float32)
    reference = float(jnp.sqrt(jnp.mean(jnp.square(exact.astype(jnp.float32)))))
    return float(jnp.sqrt(jnp.mean(jnp.square(difference)))) / (reference or 1.0)
