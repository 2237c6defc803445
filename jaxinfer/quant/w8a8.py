"""int8 weights, one scale per output channel, and activations that become int8 too, token by token, when they arrive (W8A8).

Weights are those of `int8`. Where outliers in a few features would take all of a token's 127 steps, SmoothQuant (arXiv 2211.10438) moves
part of their size into the weights: inputs are multiplied by `smooth`, the weight is divided by it before it is quantised. Good factors
come from the largest input seen for each feature in calibration (`smoothing`); without calibration there are none.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Shaped

from jaxinfer.quant import blocks, int8
from jaxinfer.quant.qarray import INT8, QSpec
from jaxinfer.quant.qarray import describe as described
from jaxinfer.sharding import ArraySpec

scales, values = int8.scales, int8.values


def describe(spec: ArraySpec, contracting: int) -> QSpec:
    """The arrays that stand for a weight [out.., in..] with `contracting` trailing dimensions that a matmul sums over."""
    return described(spec, contracting, blocks.rows(spec.shape, contracting), INT8, scheme="w8a8", activations="int8")


def describe_smoothed(spec: ArraySpec, contracting: int) -> QSpec:
    """As `describe`, with a factor for each input: the weight that is quantised is the given one divided by `smooth`."""
    rows = blocks.rows(spec.shape, contracting)
    return described(spec, contracting, rows, INT8, scheme="w8a8", extras=("smooth",), activations="int8")


def smoothing(
    inputs: Shaped[np.ndarray, "*into"], weights: Shaped[np.ndarray, "*into"], *, strength: float = 0.5
) -> Float32[np.ndarray, "*into"]:
    """`smooth` from the largest magnitudes seen of each input and in each input's column of the weight; 1 where either is zero.

    strength: 0 leaves all difficulty with the inputs, 1 moves all of it into the weight (the paper's alpha).

    Raises:
        ValueError: a strength outside [0, 1] or magnitudes that are not finite.
    """
    seen, held = inputs.astype(np.float64), weights.astype(np.float64)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength} is outside [0, 1]")
    if not (np.isfinite(seen).all() and np.isfinite(held).all()):
        raise ValueError("the largest inputs and weights must be finite")
    known = (seen > 0) & (held > 0)
    found = np.where(known, held, 1) ** (1 - strength) / np.where(known, seen, 1) ** strength
    return np.clip(found, 1e-5, 1e5).astype(np.float32)
