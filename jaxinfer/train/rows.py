"""Texts become rows of one length, and rows the batches of a step. NumPy alone.

Texts are put side by side, each where it fits first, longest first, so that little of a row is padding; attention keeps to each text
(`Sequences`). Which rows a step gets depends on the seed and the step's number alone, so a run that goes on where it was sees what it would
have seen. This file does not know where texts come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

MULTIPLE = 32  # of a row's length


class Text(NamedTuple):
    """Token ids, those from index `first` (at least 1) on to be learned. temperature, seed: with which the target made them, if it did."""

    tokens: tuple[int, ...]
    first: int
    temperature: float | None = None
    seed: int = 0


class Rows(NamedTuple):
    """Packed texts. positions: the place of a token in its text, -1 where there is none. learned: whether the token after this one is to be
    learned. owner: the number of its text, -1 where there is none."""

    tokens: Int[np.ndarray, "rows length"]
    positions: Int[np.ndarray, "rows length"]
    learned: Bool[np.ndarray, "rows length"]
    owner: Int[np.ndarray, "rows length"]


def length_for(texts: Sequence[Text], least: int) -> int:
    """The length of all rows: what the longest text needs, or `least` if that is more."""
    longest = max([least, *(len(text.tokens) for text in texts)])
    return -(-longest // MULTIPLE) * MULTIPLE


def pack(texts: Sequence[Text], length: int, multiple: int = 1) -> Rows:
    """Rows of `length` that hold all texts; their number is a multiple of `multiple` (empty rows are added)."""
    shares: list[list[int]] = []
    left: list[int] = []
    for number in sorted(range(len(texts)), key=lambda number: (-len(texts[number].tokens), number)):
        need = len(texts[number].tokens)
        row = next((row for row, room in enumerate(left) if room >= need), len(left))
        if row == len(left):
            shares, left = [*shares, []], [*left, length]
        shares[row].append(number)
        left[row] -= need
    count = max(-(-len(shares) // multiple), 1) * multiple
    tokens, positions, owner = (np.full((count, length), fill, np.int32) for fill in (0, -1, -1))
    learned = np.zeros((count, length), bool)
    for row, numbers in enumerate(shares):
        at = 0
        for number in numbers:
            text, end = texts[number], at + len(texts[number].tokens)
            tokens[row, at:end], positions[row, at:end], owner[row, at:end] = text.tokens, range(end - at), number
            learned[row, at + text.first - 1 : end - 1] = True
            at = end
    return Rows(tokens, positions, learned, owner)


def batch(rows: Rows, size: int, step: int, seed: int) -> Rows:
    """The `size` rows of a step: every epoch is a new order of them all."""
    wanted, count = np.arange(step * size, (step + 1) * size), len(rows.tokens)
    epochs = wanted // count
    order = {int(epoch): np.random.default_rng((seed, int(epoch))).permutation(count) for epoch in np.unique(epochs)}
    chosen = [int(order[int(epoch)][at % count]) for epoch, at in zip(epochs, wanted, strict=True)]
    return Rows(*(values[chosen] for values in rows))
