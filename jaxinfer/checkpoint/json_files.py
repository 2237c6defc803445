"""JSON files of a model folder, read strictly: UTF-8, an object, each name once, no NaN or Infinity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.errors import broken


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is not there, not UTF-8, not JSON or not an object.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=unique_names, parse_constant=_no_constant)
    except OSError as error:
        raise broken(path, "a JSON file", error.strerror or "an error") from None
    except (ValueError, RecursionError) as error:
        raise broken(path, "JSON", f"{type(error).__name__}: {error}", remedy="fetch it again") from None
    if not isinstance(value, dict):
        raise broken(path, "a JSON object", type(value).__name__)
    return value


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object_pairs_hook that refuses a name that stands twice in one object.

    Raises:
        ValueError: naming it.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {twice!r} stands twice in one object")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
