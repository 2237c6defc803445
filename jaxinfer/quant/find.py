"""Quantisation schemes found by the names of the files in this folder. A scheme is a file with three functions:

    describe(spec, contracting) -> QSpec    the arrays that stand for a weight [out.., in..]
    scales(piece, blocks) -> array          of a piece that holds whole blocks (`QSpec.blocks`)
    values(piece, scales) -> array          as they are stored, of any piece that cuts no more than the description allows

The last two work on NumPy arrays and depend on each block alone, so a weight may be quantised slice by slice.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from types import ModuleType

from jaxinfer.config import ConfigError

NOT_SCHEMES = frozenset({"__init__", "blocks", "find", "matmul", "observe", "qarray", "quantise", "rules"})


def schemes() -> tuple[str, ...]:
    """Names of the schemes that exist."""
    return tuple(sorted(file.stem for file in Path(__file__).parent.glob("*.py") if file.stem not in NOT_SCHEMES))


def find_scheme(name: str) -> ModuleType:
    """The module of a scheme.

    Raises:
        ConfigError: there is none of that name; the message lists those that exist and the nearest name.
    """
    known = schemes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"quantisation scheme {name!r} does not exist; there are: {', '.join(known)}{hint}")
    return importlib.import_module(f"jaxinfer.quant.{name}")
