"""Matrices as they are meant, read from tensors as they are stored: transposed, unpacked, spread, shifted; slice by slice.

A view is a `Source` (shape, dtype, read) over another one, so the loader cuts a packed matrix as it cuts a plain one: a slice of the
view reads the words that hold it and no others. Views compute exactly and know no format: which bits mean what is said by those who
stack them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxinfer.checkpoint.errors import broken
from jaxinfer.checkpoint.formats.safetensors import LazyTensor
from jaxinfer.models.weights import Slices, Source

WORD_BITS = 32


@dataclass(frozen=True)
class Transposed:
    """A matrix whose file holds its transpose."""

    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the view."""
        return self.source.shape[::-1]

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the source."""
        return self.source.dtype

    def read(self, index: Slices) -> Shaped[np.ndarray, "..."]:
        """One slice per dimension of the view."""
        return self.source.read(index[::-1]).T


@dataclass(frozen=True)
class Unpacked:
    """Small whole numbers out of 32-bit words: `size` of them along `axis`, `bits` wide, as int16, less `offset`.

    order: in the place i of a word, counted from its low bits, lies element order[i] of the word's elements.
    """

    source: Source
    axis: int
    size: int
    bits: int = 4
    offset: int = 0
    order: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the view."""
        return (*self.source.shape[: self.axis], self.size, *self.source.shape[self.axis + 1 :])

    @property
    def dtype(self) -> np.dtype:
        """int16: an offset may take 8 bits out of int8's range."""
        return np.dtype(np.int16)

    def read(self, index: Slices) -> Shaped[np.ndarray, "..."]:
        """One slice per dimension of the view."""
        each, wanted = WORD_BITS // self.bits, index[self.axis]
        first, last = wanted.start // each, -(-wanted.stop // each)
        words = self.source.read((*index[: self.axis], slice(first, last), *index[self.axis + 1 :])).view(np.uint32)
        places = np.argsort(self.order) if self.order else np.arange(each)
        shifts = (places * self.bits).astype(np.uint32).reshape(each, *(1,) * (words.ndim - self.axis - 1))
        found = (np.expand_dims(words, self.axis + 1) >> shifts) & np.uint32((1 << self.bits) - 1)
        merged = found.reshape(*words.shape[: self.axis], -1, *words.shape[self.axis + 1 :])
        cut = [slice(None)] * words.ndim
        cut[self.axis] = slice(wanted.start - first * each, wanted.stop - first * each)
        return merged[tuple(cut)].astype(np.int16) - np.int16(self.offset)


@dataclass(frozen=True)
class Spread:
    """Each element stands for `block` neighbours along `axis`, the last one for as many as are left of `size`."""

    source: Source
    axis: int
    block: int
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the view."""
        return (*self.source.shape[: self.axis], self.size, *self.source.shape[self.axis + 1 :])

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the source."""
        return self.source.dtype

    def read(self, index: Slices) -> Shaped[np.ndarray, "..."]:
        """One slice per dimension of the view."""
        wanted = index[self.axis]
        first, last = wanted.start // self.block, -(-wanted.stop // self.block)
        found = self.source.read((*index[: self.axis], slice(first, last), *index[self.axis + 1 :]))
        return np.take(found, np.arange(wanted.start, wanted.stop) // self.block - first, axis=self.axis)


@dataclass(frozen=True)
class Column:
    """A number, a vector of one or of many as a matrix with one column."""

    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the view."""
        return (int(np.prod(self.source.shape)), 1)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the source."""
        return self.source.dtype

    def read(self, index: Slices) -> Shaped[np.ndarray, "..."]:
        """One slice per dimension of the view."""
        whole = self.source.read(tuple(slice(0, size) for size in self.source.shape))
        return whole.reshape(-1, 1)[index]


@dataclass(frozen=True)
class Picked:
    """Columns of a matrix in another order."""

    source: Source
    columns: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the view."""
        return (self.source.shape[0], len(self.columns))

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the source."""
        return self.source.dtype

    def read(self, index: Slices) -> Shaped[np.ndarray, "..."]:
        """One slice per dimension of the view."""
        whole = self.source.read((index[0], slice(0, self.source.shape[1])))
        return whole[:, list(self.columns[index[1]])]


@dataclass(frozen=True)
class Shifted:
    """Whole numbers plus a constant, as int16."""

    source: Source
    by: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the view."""
        return self.source.shape

    @property
    def dtype(self) -> np.dtype:
        """int16."""
        return np.dtype(np.int16)

    def read(self, index: Slices) -> Shaped[np.ndarray, "..."]:
        """One slice per dimension of the view."""
        return self.source.read(index).astype(np.int16) + np.int16(self.by)


@dataclass(frozen=True)
class Scales:
    """Scales as float32, checked as they are read: every one finite and above 0. `origin` names them in the error."""

    source: Source
    origin: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the view."""
        return self.source.shape

    @property
    def dtype(self) -> np.dtype:
        """float32, which holds every scale exactly (float64 scales are refused before)."""
        return np.dtype(np.float32)

    def read(self, index: Slices) -> Shaped[np.ndarray, "..."]:
        """One slice per dimension of the view.

        Raises:
            CheckpointError: a scale that is NaN, infinite, zero or negative.
        """
        found = self.source.read(index).astype(np.float32)
        wrong = ~(np.isfinite(found) & (found > 0))
        if wrong.any():
            value = found[wrong].flat[0]
            raise broken(
                self.origin.file.path, "scales that are finite and above 0", f"{value:g}", tensor=self.origin.name, remedy="fetch it again"
            )
        return found


@dataclass(frozen=True)
class Within:
    """Numbers as they are, checked as they are read: all within [low, high], or finite where no bounds are given."""

    source: Source
    origin: LazyTensor
    low: int | None = None
    high: int | None = None
    to: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the view."""
        return self.source.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype asked for, by default the source's."""
        return self.source.dtype if self.to is None else np.dtype(self.to)

    def read(self, index: Slices) -> Shaped[np.ndarray, "..."]:
        """One slice per dimension of the view.

        Raises:
            CheckpointError: a number that is not finite, or out of bounds.
        """
        found = self.source.read(index)
        if self.low is None or self.high is None:
            wrong, expected = ~np.isfinite(found), "numbers that are finite"
        else:
            wrong, expected = (found < self.low) | (found > self.high), f"numbers in {self.low}..{self.high}"
        if wrong.any():
            raise broken(self.origin.file.path, expected, f"{float(found[wrong].flat[0]):g}", tensor=self.origin.name)
        return np.ascontiguousarray(found.astype(self.dtype, copy=False))


@dataclass(frozen=True)
class Scaled(LazyTensor):
    """A tensor whose last dimension is multiplied by factors (or divided), in float32 where it is divided. Exact for powers of two."""

    factors: tuple[float, ...] = ()
    divided: bool = False

    @classmethod
    def of(cls, tensor: LazyTensor, factors: np.ndarray, *, divided: bool) -> Scaled:
        """A tensor of a file with factors for its last dimension."""
        numbers = tuple(float(it) for it in factors)
        dtype = np.dtype(np.float32) if divided else tensor.dtype
        return cls(tensor.file, tensor.name, dtype, tensor.shape, tensor.start, numbers, divided)

    def read(self, index: Slices) -> Shaped[np.ndarray, "..."]:
        """One slice per dimension of the view."""
        source = self.file.tensors()[self.name]
        factors = np.asarray(self.factors[index[-1]], np.float32)
        wide = source.read(index).astype(np.float32)
        return (wide / factors if self.divided else wide * factors).astype(self.dtype)
