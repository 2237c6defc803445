"""Formats of quantised checkpoints, found by the files of this folder: each says in `QUANT_METHOD` how config.json calls it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxinfer.checkpoint.errors import broken
from jaxinfer.checkpoint.formats.quantised import Format, Options

FIELD = "quantization_config"


def formats() -> dict[str, ModuleType]:
    """Every format by its quant_method."""
    names = sorted(file.stem for file in Path(__file__).parent.glob("*.py"))
    modules = [importlib.import_module(f"{__name__.rpartition('.')[0]}.{name}") for name in names if name not in ("__init__", "find")]
    return {module.QUANT_METHOD: module for module in modules if hasattr(module, "QUANT_METHOD")}


def format_of(config: Mapping[str, Any], file: Path) -> Format | None:
    """The format that a config.json (which came from `file`) asks for; None where its weights are not quantised.

    Raises:
        CheckpointError: a quant_method or an option of it that is not implemented, by name.
    """
    options = Options(config, file, "config.json").inside(FIELD)
    if options is None:
        return None
    options, known = Options(options.values, file), formats()
    method = options.values.get("quant_method")
    if method not in known:
        remedy = "use a checkpoint in one of these, or an unquantised one with --quantize"
        raise broken(file, f"{FIELD}.quant_method = {' or '.join(map(repr, known))}", method, remedy=remedy)
    return known[method].read(options)
