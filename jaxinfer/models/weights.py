"""How a checkpoint's tensors become ours: renamed, reshaped, joined; read slice by slice, never whole.

A transform says which tensors of the file it needs, with their exact shapes, and builds any slice of our array from slices of those.
`Part` is one tensor, its dimensions split or not; `Joined` puts several parts side by side, `Stacked` one
for each expert. Names may hold one `*`, the layer's number.
Knows no file format: a tensor is anything with `shape` and `read(slices)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

Slices = tuple[slice, ...]
Split = Callable[[Any], tuple[tuple[int, ...], ...]]


@runtime_checkable
class Source(Protocol):
    """A tensor that is still in its file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Its dtype in the file."""
        ...

    def read(self, index: Slices) -> np.ndarray:
        """The values of one slice per dimension (start and stop given, step 1)."""
        ...


@dataclass(frozen=True)
class Part:
    """One tensor of the checkpoint.

    split: from the model's config to our leading dimensions, grouped as the file merges them: ((8, 4, 64),) means that the file's first
    dimension of 2048 is [8, 4, 64] to us. Dimensions that follow, and all without a split, are stored as they are.
    """

    name: str
    split: Split | None = None

    def groups(self, config: Any, target: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Our dimensions, grouped by the file's; `target` is the shape of our array."""
        split = () if self.split is None else self.split(config)
        return (*split, *((size,) for size in target[sum(len(group) for group in split) :]))

    def needs(self, config: Any, target: tuple[int, ...], layer: str) -> dict[str, tuple[int, ...]]:
        """The tensor's name in the checkpoint and the shape that it must have."""
        return {self.name.replace("*", layer): tuple(math.prod(group) for group in self.groups(config, target))}

    def read(
        self, sources: Mapping[str, Source], config: Any, target: tuple[int, ...], layer: str, index: Slices
    ) -> Shaped[np.ndarray, "..."]:
        """The slice `index` of our view of the tensor."""
        remaining, runs = index, []
        for group in self.groups(config, target):
            runs.append(_Run.of(group, remaining[: len(group)]))
            remaining = remaining[len(group) :]
        piece = sources[self.name.replace("*", layer)].read(tuple(run.outer for run in runs))
        shape = [size for run in runs for size in run.shape]
        return piece.reshape(shape)[tuple(part for run in runs for part in run.inner)]

    def tensors(self, config: Any, array: Shaped[np.ndarray, "..."], layer: str) -> dict[str, np.ndarray]:
        """The inverse: the tensors of the checkpoint that our array is made of."""
        return {name: array.reshape(shape) for name, shape in self.needs(config, array.shape, layer).items()}


class _Run(NamedTuple):
    """A slice of dimensions that the file merges into one: the shortest run of the merged one that holds it, that run's shape
    in our dimensions, and what to cut out of it."""

    outer: slice
    shape: tuple[int, ...]
    inner: Slices

    @classmethod
    def of(cls, group: tuple[int, ...], wanted: Slices) -> _Run:
        """For the slices `wanted`, one per dimension of the group."""
        depth, offset = 0, 0
        while depth < len(group) - 1 and wanted[depth].stop - wanted[depth].start == 1:
            offset += wanted[depth].start * math.prod(group[depth + 1 :])
            depth += 1
        block, first = math.prod(group[depth + 1 :]), wanted[depth]
        outer = slice(offset + first.start * block, offset + first.stop * block)
        shape = (*(1,) * depth, first.stop - first.start, *group[depth + 1 :])
        return cls(outer, shape, (*(slice(None),) * (depth + 1), *wanted[depth + 1 :]))


@dataclass(frozen=True)
class Joined:
    """Parts side by side along dimension `axis`, each with `len` along it as its split says."""

    axis: int
    parts: tuple[Part, ...]

    def needs(self, config: Any, target: tuple[int, ...], layer: str) -> dict[str, tuple[int, ...]]:
        """The tensors' names in the checkpoint and the shapes that they must have."""
        needed: dict[str, tuple[int, ...]] = {}
        for part in self.parts:
            needed.update(part.needs(config, target, layer))
        return needed

    def read(
        self, sources: Mapping[str, Source], config: Any, target: tuple[int, ...], layer: str, index: Slices
    ) -> Shaped[np.ndarray, "..."]:
        """The slice `index` of the joined array; parts that it does not touch are not read."""
        wanted, start, pieces = index[self.axis], 0, []
        for part in self.parts:
            length = [size for group in part.groups(config, target) for size in group][self.axis]
            low, high = max(wanted.start - start, 0), min(wanted.stop - start, length)
            if low < high:
                local = (*index[: self.axis], slice(low, high), *index[self.axis + 1 :])
                pieces.append(part.read(sources, config, target, layer, local))
            start += length
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.axis)

    def tensors(self, config: Any, array: Shaped[np.ndarray, "..."], layer: str) -> dict[str, np.ndarray]:
        """The inverse: the tensors of the checkpoint that our array is made of."""
        found, start = {}, 0
        for part in self.parts:
            length = [size for group in part.groups(config, array.shape) for size in group][self.axis]
            own = (slice(None),) * self.axis + (slice(start, start + length),)
            found |= part.tensors(config, array[own], layer)
            start += length
        return found


@dataclass(frozen=True)
class Stacked:
    """One transform for each index of our first dimension, whose number stands in the tensors' names where `{}` is."""

    each: Part | Joined

    def needs(self, config: Any, target: tuple[int, ...], layer: str) -> dict[str, tuple[int, ...]]:
        """The tensors' names in the checkpoint and the shapes that they must have."""
        needed: dict[str, tuple[int, ...]] = {}
        for number in range(target[0]):
            needed.update(_numbered(self.each, number).needs(config, target[1:], layer))
        return needed

    def read(
        self, sources: Mapping[str, Source], config: Any, target: tuple[int, ...], layer: str, index: Slices
    ) -> Shaped[np.ndarray, "..."]:
        """The slice `index` of the stack; transforms outside it are not read."""
        numbers, rest = range(index[0].start, index[0].stop), index[1:]
        return np.stack([_numbered(self.each, number).read(sources, config, target[1:], layer, rest) for number in numbers])

    def tensors(self, config: Any, array: Shaped[np.ndarray, "..."], layer: str) -> dict[str, np.ndarray]:
        """The inverse: the tensors of the checkpoint that our array is made of."""
        found: dict[str, np.ndarray] = {}
        for number, part in enumerate(array):
            found |= _numbered(self.each, number).tensors(config, part, layer)
        return found


def _numbered(transform: Part | Joined, number: int) -> Part | Joined:
    if isinstance(transform, Joined):
        return replace(transform, parts=tuple(replace(part, name=part.name.replace("{}", str(number))) for part in transform.parts))
    return replace(transform, name=transform.name.replace("{}", str(number)))


Transform = Part | Joined | Stacked


def transform_of(name: str, weights: Mapping[str, Transform]) -> tuple[Transform, str]:
    """The transform for one of our names and the layer's number ("" where the name has none).

    Raises:
        KeyError: the model file has no entry for the name.
    """
    layer = next((part for part in name.split(".") if part.isdigit()), "")
    return weights[".".join("*" if part.isdigit() else part for part in name.split("."))], layer
