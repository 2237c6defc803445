"""What the formats of quantised checkpoints have in common: how a format answers, and strict reading of its options.

A format is a file of this folder with `QUANT_METHOD`, the word by which config.json calls it, and `read(options) -> Format`. A Format says
of each linear module whether it is quantised and how (`Encoding`), which tensors must be there for it (`needs`), and gives the matrix that
they mean (`Stored`): whole numbers or fp8 values, scales and zeros as [out, in], [out, groups] and [out, groups], with

    weight[:, order] = (values - zeros) * scales,  column i belonging to group i // encoding.group

exactly: nothing is quantised again. Modules are named as in the checkpoint, without ".weight".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from jaxinfer.checkpoint.errors import CheckpointError, broken
from jaxinfer.checkpoint.formats.safetensors import LazyTensor
from jaxinfer.models.weights import Source

SCALE_DTYPES = ("float16", "bfloat16", "float32")


class Encoding(NamedTuple):
    """How one module is quantised: the scheme (a file of jaxinfer/quant), the inputs that share a scale (None: all of a row), zeros,
    and whether its columns may lie in another order than the inputs."""

    scheme: str
    group: int | None = None
    zeros: bool = False
    ordered: bool = False


class Need(NamedTuple):
    """A tensor that must be there: in one of these shapes, in one of these dtypes, under its own name or the other one."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    other: str = ""


class Stored(NamedTuple):
    """A quantised matrix in its file; every view's first dimension is the module's outputs.

    order: which input each column of the views multiplies, where it is not the one in its place.
    """

    values: Source
    scales: Source
    zeros: Source | None = None
    order: tuple[int, ...] | None = None


@runtime_checkable
class Format(Protocol):
    """One checkpoint's quantisation, as its config.json describes it."""

    @property
    def unused(self) -> tuple[str, ...]:
        """Patterns of tensors that may be there and are not needed."""
        ...

    @property
    def empty(self) -> tuple[str, ...]:
        """Patterns of tensors that may be there if all their numbers are 0."""
        ...

    def encoding(self, module: str) -> Encoding | None:
        """How a linear module is quantised; None: it is not."""
        ...

    def needs(self, module: str, shape: tuple[int, int]) -> dict[str, Need]:
        """The tensors of a quantised module [out, in], by name."""
        ...

    def stored(self, module: str, shape: tuple[int, int], tensors: Mapping[str, LazyTensor]) -> Stored:
        """The matrix that a module's tensors mean; they have been checked against `needs`."""
        ...


@dataclass(frozen=True)
class Options:
    """An object of config.json, read strictly: each option has a meaning here, is known to be harmless, or is refused by name."""

    values: Mapping[str, Any]
    file: Path
    where: str = "quantization_config"

    def one_of(self, name: str, known: tuple[Any, ...], *, default: Any = None, remedy: str = "") -> Any:
        """The value of an option, which must be one of those known (true is not 1 here).

        Raises:
            CheckpointError: it is another one.
        """
        value = self.values.get(name, default)
        if not any(type(value) is type(it) and value == it for it in known):
            expected = " or ".join(repr(it) for it in known)
            raise broken(self.file, f"{self.where}.{name} = {expected}", value, remedy=remedy or "use another checkpoint of this model")
        return value

    def group_size(self, name: str, *, default: Any = None) -> int | None:
        """Inputs that share a scale; None where -1 or nothing says that it is all of them.

        Raises:
            CheckpointError: neither a whole number above 0 nor -1.
        """
        value = self.values.get(name, default)
        if value is None or (value == -1 and not isinstance(value, bool)):
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise broken(self.file, f"{self.where}.{name} = a whole number above 0, or -1", value)
        return value

    def words(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty where there is none.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise broken(self.file, f"{self.where}.{name} = a list of strings", value)
        return tuple(value)

    def inside(self, name: str) -> Options | None:
        """An object in this one; None where there is none, or an empty one.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise broken(self.file, f"{self.where}.{name} = an object", value)
        return Options(value, self.file, f"{self.where}.{name}") if value else None

    def finish(self, known: str) -> None:
        """Refuse options that are none of the known ones (names with blanks between them); null asks for nothing.

        Raises:
            CheckpointError: naming the first of them.
        """
        unknown = sorted({name for name, value in self.values.items() if value is not None} - set(known.split()))
        if unknown:
            value = self.values[unknown[0]]
            raise broken(
                self.file, f"options of {self.where} that are implemented", f"{unknown[0]} = {value!r}",
                remedy="ignoring it could change the weights; use a checkpoint without it",
            )  # fmt: skip


@dataclass(frozen=True)
class ModuleNames:
    """Which modules a list of a config means: full names, "re:" and a regular expression, or the last parts of a name."""

    entries: tuple[str, ...]

    def has(self, module: str) -> bool:
        """Whether the list names the module.

        Raises:
            CheckpointError: a regular expression that is none.
        """
        return any(self._matches(entry, module) for entry in self.entries)

    @staticmethod
    def _matches(entry: str, module: str) -> bool:
        if entry.startswith("re:"):
            try:
                return re.match(entry[3:], module) is not None
            except re.error as error:
                raise CheckpointError(f"config.json: quantization_config names modules by {entry!r}, not an expression: {error}") from None
        return module == entry or f".{module}.".find(f".{entry}.") >= 0


class Order(NamedTuple):
    """How the columns of a matrix lie: whole groups in another order, or else columns, which are put side by side by group.

    groups: the row of scales of each run of columns. columns: the input that each column multiplies, once groups are side by side.
    """

    groups: tuple[int, ...] = ()
    columns: tuple[int, ...] | None = None


def column_order(tensor: LazyTensor, group: int) -> Order | None:
    """The order of columns, from the tensor that says the group of each; None where groups follow one another.

    Raises:
        CheckpointError: the tensor holds numbers that are no group's, or too many or too few of one.
    """
    found: Int[np.ndarray, " columns"] = tensor.read((slice(0, tensor.shape[0]),))
    groups = -(-len(found) // group)
    if found.min() < 0 or found.max() >= groups:
        wrong = found[(found < 0) | (found >= groups)][0]
        raise broken(tensor.file.path, f"groups in 0..{groups - 1}", int(wrong), tensor=tensor.name)
    if (counts := np.bincount(found, minlength=groups)).max() > group or len(found) != groups * group:
        raise broken(tensor.file.path, f"{group} columns in each group", f"{counts.max()} in group {counts.argmax()}", tensor=tensor.name)
    first = found[::group]
    if np.array_equal(first, np.arange(groups)) and np.array_equal(np.repeat(first, group), found):
        return None
    if np.array_equal(np.repeat(first, group), found):
        return Order(groups=tuple(first.tolist()))
    return Order(columns=tuple(np.argsort(found, kind="stable").tolist()))
