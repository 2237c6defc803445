"""Texts become rows of one length, and rows the batches of a step. NumPy alone.

Texts are put side by side, longest first, each where it leaves least room, so that little of a row is padding; attention keeps to each text
(`Sequences`). Which rows a step gets depends on the seed and the step's number alone, so a run that goes on where it was sees what it would
have seen. This file does not know where texts come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

MULTIPLE = 32  # of a row's length
COLD = 0.5  # greedy text is compared at this temperature: the likeliest tokens count most, and near ties still show


class Text(NamedTuple):
    """Token ids, those from index `first` (at least 1) on to be learned. temperature, seed: with which the target made them, if it did."""

    tokens: tuple[int, ...]
    first: int
    temperature: float | None = None
    seed: int = 0

    @property
    def compared_at(self) -> float:
        """The temperature at which student and target are compared here: the one that drafts for such text are drawn at."""
        return 1.0 if self.temperature is None else max(self.temperature, COLD)


class Rows(NamedTuple):
    """Packed texts. positions: the place of a token in its text, -1 where there is none. learned: whether the token after this one is to be
    learned. owner: the number of its text, -1 where there is none. temperature: its `compared_at`, 1 where there is none."""

    tokens: Int[np.ndarray, "rows length"]
    positions: Int[np.ndarray, "rows length"]
    learned: Bool[np.ndarray, "rows length"]
    owner: Int[np.ndarray, "rows length"]
    temperature: Float[np.ndarray, "rows length"]


def length_for(texts: Sequence[Text], least: int) -> int:
    """The length of all rows: what the longest text needs, or `least` if that is more."""
    longest = max([least, *(len(text.tokens) for text in texts)])
    return -(-longest // MULTIPLE) * MULTIPLE


def pack(texts: Sequence[Text], length: int, multiple: int = 1) -> Rows:
    """Rows of `length` that hold all texts; their number is a multiple of `multiple` (empty rows are added)."""
    shares = _shares([len(text.tokens) for text in texts], length)
    count = max(-(-len(shares) // multiple), 1) * multiple
    tokens, positions, owner = (np.full((count, length), fill, np.int32) for fill in (0, -1, -1))
    learned, temperature = np.zeros((count, length), bool), np.ones((count, length), np.float32)
    for row, numbers in enumerate(shares):
        at = 0
        for number in numbers:
            text, end = texts[number], at + len(texts[number].tokens)
            tokens[row, at:end], positions[row, at:end], owner[row, at:end] = text.tokens, range(end - at), number
            learned[row, at + text.first - 1 : end - 1] = True
            temperature[row, at:end] = text.compared_at
            at = end
    return Rows(tokens, positions, learned, owner, temperature)


def batch(rows: Rows, size: int, step: int, seed: int) -> Rows:
    """The `size` rows of a step: every epoch is a new order of them all."""
    wanted, count = np.arange(step * size, (step + 1) * size), len(rows.tokens)
    epochs = wanted // count
    chosen = [int(_order(count, seed, int(epoch))[at % count]) for epoch, at in zip(epochs, wanted, strict=True)]
    return Rows(*(values[chosen] for values in rows))


def _shares(needs: Sequence[int], length: int) -> list[list[int]]:
    """The numbers of the texts in each row."""
    shares: list[list[int]] = []
    rooms: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the room that is left
    for number in sorted(range(len(needs)), key=lambda number: (-needs[number], number)):
        need = needs[number]
        room = next((room for room in range(need, length) if rooms[room]), length)
        row = rooms[room].pop() if rooms[room] else len(shares)
        if row == len(shares):
            shares.append([])
        shares[row].append(number)
        rooms[room - need].append(row)
    return shares


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Int[np.ndarray, " rows"]:
    """The order of an epoch's rows."""
    return np.random.default_rng((seed, epoch)).permutation(count)
