"""Blocks of a weight that share a scale: how long they are along each dimension, what the largest number in each is.

A block is given as its length along each dimension of the weight: (1, 64) is 64 inputs of one output channel, (1, 4, 32) for a weight
[out, 4, 32] its whole row. Works on NumPy arrays, as they come out of a file. Knows no scheme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Shaped

Blocks = tuple[int, ...]


def rows(shape: Sequence[int], contracting: int) -> Blocks:
    """One block for each output channel of a weight [out.., in..] with `contracting` trailing dimensions that a matmul sums over."""
    out = len(shape) - contracting
    return (*(1,) * out, *shape[out:])


def run(shape: Sequence[int], length: int) -> Blocks | None:
    """Blocks of `length` elements that follow each other in dimensions merged into one; None when such a block is not a box.

    >>> run((4, 2, 64), 128), run((3, 64), 32), run((3, 64), 128)
    ((1, 2, 64), (1, 32), None)
    """
    found, rest = [], length
    for size in reversed(shape):
        step = math.gcd(size, rest)
        if step not in (size, rest):
            return None
        found.append(step)
        rest //= step
    return tuple(reversed(found)) if rest == 1 else None


def counts(shape: Sequence[int], blocks: Blocks) -> tuple[int, ...]:
    """How many blocks there are along each dimension.

    Raises:
        ValueError: a dimension that is not a whole number of blocks.
    """
    if len(shape) != len(blocks) or any(block < 1 or size % block for size, block in zip(shape, blocks, strict=True)):
        raise ValueError(f"a weight of shape {tuple(shape)} is not a whole number of blocks {blocks}")
    return tuple(size // block for size, block in zip(shape, blocks, strict=True))


def largest(piece: Shaped[np.ndarray, "..."], blocks: Blocks) -> Float32[np.ndarray, "..."]:
    """The largest magnitude in each block of a piece that holds whole blocks, float32.

    Raises:
        ValueError: a block holds NaN or infinity, or the piece cuts a block.
    """
    split = [part for pair in zip(counts(piece.shape, blocks), blocks, strict=True) for part in pair]
    found = np.max(np.abs(piece.astype(np.float32)).reshape(split), axis=tuple(range(1, len(split), 2)), initial=0.0)
    if not np.isfinite(found).all():
        raise ValueError("a weight that is NaN or infinite cannot be quantised")
    return found


def spread(per_block: Shaped[np.ndarray, "..."], shape: Sequence[int]) -> Shaped[np.ndarray, "..."]:
    """One number per block, repeated over an array of `shape`, which the blocks divide evenly along each dimension."""
    for axis, (size, count) in enumerate(zip(shape, per_block.shape, strict=True)):
        if count > 1:
            per_block = np.repeat(per_block, size // count, axis=axis)
    return np.broadcast_to(per_block, shape)


def steps(top: Float32[np.ndarray, "..."], limit: float) -> Float32[np.ndarray, "..."]:
    """Scales that bring `top` to `limit`, float32; 1 where there is nothing but zeros."""
    return np.where(top > 0, np.maximum(top / np.float32(limit), np.finfo(np.float32).tiny), 1).astype(np.float32)
