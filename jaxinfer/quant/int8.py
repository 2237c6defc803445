"""int8 weights, one scale per output channel, activations untouched (W8A16): scale = max|row| / 127, round to nearest, ties to even.

A scale depends on the whole row, also where the mesh shards the contracted dimension: so the loader asks for the scales of whole rows
first (`scales`) and quantises each device's slice with them (`values`), and the result does not depend on the mesh. Follows LLM.int8
(arXiv 2208.07339) without its outlier path. Works on NumPy arrays, as they come out of a file.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int8, Shaped

from jaxinfer.quant import blocks as of_blocks
from jaxinfer.quant.blocks import Blocks
from jaxinfer.quant.qarray import INT8, QSpec
from jaxinfer.quant.qarray import describe as described
from jaxinfer.sharding import ArraySpec

LIMIT = 127  # -128 is never made, so negation is exact


def describe(spec: ArraySpec, contracting: int) -> QSpec:
    """The arrays that stand for a weight [out.., in..] with `contracting` trailing dimensions that a matmul sums over."""
    return described(spec, contracting, of_blocks.rows(spec.shape, contracting), INT8, scheme="int8")


def scales(piece: Shaped[np.ndarray, "..."], blocks: Blocks) -> Float32[np.ndarray, "..."]:
    """Scales of a piece that holds whole blocks; 1 where there are only zeros.

    Raises:
        ValueError: a block holds NaN or infinity.
    """
    return of_blocks.steps(of_blocks.largest(piece, blocks), LIMIT)


def values(piece: Shaped[np.ndarray, "..."], scales: Float32[np.ndarray, "..."]) -> Int8[np.ndarray, "..."]:
    """Any piece of a weight in units of its scales: as many along each dimension as the piece touches blocks."""
    return np.clip(np.rint(piece.astype(np.float32) / of_blocks.spread(scales, piece.shape)), -LIMIT, LIMIT).astype(np.int8)
