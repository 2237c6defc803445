"""float8 (e4m3) weights, one scale per output channel, activations untouched: scale = max|row| / 448, round to nearest, ties to even.

The number format is that of arXiv 2209.05433 in its variant without infinities. One scale per tensor, or per tile of 128 x 128
(DeepSeek-V3, arXiv 2412.19437), as checkpoints come with them, are other blocks of the same arrays: `qarray.describe`. Works on NumPy
arrays, as they come out of a file.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Shaped

from jaxinfer.quant import blocks as of_blocks
from jaxinfer.quant.blocks import Blocks
from jaxinfer.quant.qarray import FP8, QSpec
from jaxinfer.quant.qarray import describe as described
from jaxinfer.sharding import ArraySpec

LIMIT = float(ml_dtypes.finfo(FP8).max)


def describe(spec: ArraySpec, contracting: int) -> QSpec:
    """The arrays that stand for a weight [out.., in..] with `contracting` trailing dimensions that a matmul sums over."""
    return described(spec, contracting, of_blocks.rows(spec.shape, contracting), FP8, scheme="fp8")


def scales(piece: Shaped[np.ndarray, "..."], blocks: Blocks) -> Float32[np.ndarray, "..."]:
    """Scales of a piece that holds whole blocks; 1 where there are only zeros.

    Raises:
        ValueError: a block holds NaN or infinity.
    """
    return of_blocks.steps(of_blocks.largest(piece, blocks), LIMIT)


def values(piece: Shaped[np.ndarray, "..."], scales: Float32[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Any piece of a weight in units of its scales: as many along each dimension as the piece touches blocks."""
    steps = piece.astype(np.float32) / of_blocks.spread(scales, piece.shape)
    return np.clip(steps, -LIMIT, LIMIT).astype(FP8)
