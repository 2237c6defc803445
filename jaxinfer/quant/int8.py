"""int8 weights, one scale per output channel, activations untouched (W8A16): scale = max|row| / 127, round to nearest, ties to even.

A scale depends on the whole row, also where the mesh shards the contracted dimension: so the loader asks for the scales of whole rows
first (`scales`) and quantises each device's slice with them (`values`), and the result does not depend on the mesh. Follows LLM.int8
(arXiv 2208.07339) without its outlier path. Works on NumPy arrays, as they come out of a file.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int8, Shaped

from jaxinfer.quant.qarray import LIMIT, QSpec
from jaxinfer.sharding import ArraySpec


def describe(spec: ArraySpec, contracting: int) -> QSpec:
    """The arrays that stand for a weight [out.., in..] with `contracting` trailing dimensions that a matmul sums over."""
    out = len(spec.shape) - contracting
    values = ArraySpec(spec.shape, np.dtype(np.int8), spec.axes)
    return QSpec(values, ArraySpec(spec.shape[:out], np.dtype(np.float32), spec.axes[:out]), "int8")


def scales(rows: Shaped[np.ndarray, "..."], contracting: int) -> Float32[np.ndarray, "..."]:
    """Scales of whole rows [out.., in..]; a row of zeros has scale 1.

    Raises:
        ValueError: a row holds NaN or infinity.
    """
    trailing = tuple(range(-contracting, 0))
    largest = np.max(np.abs(rows.astype(np.float32)), axis=trailing, initial=0.0)
    if not np.isfinite(largest).all():
        raise ValueError("a weight that is NaN or infinite cannot be quantised")
    return np.where(largest > 0, np.maximum(largest / np.float32(LIMIT), np.finfo(np.float32).tiny), 1).astype(np.float32)


def values(piece: Shaped[np.ndarray, "..."], row_scales: Float32[np.ndarray, "..."]) -> Int8[np.ndarray, "..."]:
    """Any piece of rows [out.., in..] in units of the scales [out..] of those rows."""
    expanded = row_scales.reshape(row_scales.shape + (1,) * (piece.ndim - row_scales.ndim))
    return np.clip(np.rint(piece.astype(np.float32) / expanded), -LIMIT, LIMIT).astype(np.int8)
