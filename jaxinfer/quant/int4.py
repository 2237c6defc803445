"""int4 weights in groups of inputs with a scale each, two to a byte, activations untouched (W4A16).

A group is 128 inputs of one output channel where the weight's dimensions allow it, else 64, else 32. scale = max|group| / 7.5 in
bfloat16, values from -8 to 7 round to nearest and are stored with 8 added, so no weight is further than half a step away. This is plain
rounding, the grid of GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978) without their search; their checkpoints fit the same arrays, zero
points included. Works on NumPy arrays, as they come out of a file.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped, UInt8

from jaxinfer.config import ConfigError
from jaxinfer.quant import blocks as of_blocks
from jaxinfer.quant.blocks import Blocks
from jaxinfer.quant.qarray import PACKED, ZERO, QSpec
from jaxinfer.quant.qarray import describe as described
from jaxinfer.sharding import ArraySpec

GROUPS = (128, 64, 32)


def describe(spec: ArraySpec, contracting: int) -> QSpec:
    """The arrays that stand for a weight [out.., in..] with `contracting` trailing dimensions that a matmul sums over.

    Raises:
        ConfigError: its inputs cannot be cut into groups.
    """
    out = len(spec.shape) - contracting
    groups = next((group for size in GROUPS if (group := of_blocks.run(spec.shape[out:], size))), None)
    if groups is None:
        raise ConfigError(f"int4 needs groups of {', '.join(map(str, GROUPS))} inputs, a weight of shape {spec.shape} has none; keep it")
    blocks = (*(1,) * out, *groups)
    return described(spec, contracting, blocks, PACKED, scheme="int4", scale_dtype=ml_dtypes.bfloat16)


def scales(piece: Shaped[np.ndarray, "..."], blocks: Blocks) -> Float[np.ndarray, "..."]:
    """Scales of a piece that holds whole blocks; 1 where there are only zeros.

    Raises:
        ValueError: a block holds NaN or infinity.
    """
    return of_blocks.steps(of_blocks.largest(piece, blocks), ZERO - 0.5).astype(ml_dtypes.bfloat16)


def values(piece: Shaped[np.ndarray, "*shape whole"], scales: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "*shape half"]:
    """Any piece of a weight in units of its scales: as many along each dimension as the piece touches blocks."""
    steps = np.rint(piece.astype(np.float32) / of_blocks.spread(scales.astype(np.float32), piece.shape))
    return pack((np.clip(steps, -ZERO, ZERO - 1) + ZERO).astype(np.uint8))


def pack(halves: UInt8[np.ndarray, "*shape whole"]) -> UInt8[np.ndarray, "*shape half"]:
    """Numbers from 0 to 15 two to a byte, the even one of the last dimension in the low half."""
    return halves[..., 0::2] | (halves[..., 1::2] << 4)
