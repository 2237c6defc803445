"""The one error of this package: a checkpoint that cannot be loaded, said in one message that names what is wrong where."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged or not what the model needs. The message stands alone: show it, without a traceback."""


def broken(file: Path | str, expected: object, found: object, *, tensor: str | None = None, remedy: str = "") -> CheckpointError:
    """The error for a file (and a tensor in it) that should hold one thing and holds another."""
    name = f"{file}: tensor {tensor!r}" if tensor is not None else str(file)
    return CheckpointError(f"{name}: expected {expected}, found {_short(found)}" + (f"; {remedy}" if remedy else ""))


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 160 else text[:157] + "..."
