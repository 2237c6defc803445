"""Model files found by Hugging Face `model_type`: `llama` is `jaxinfer/models/llama.py`. Nothing is registered.

A model file offers `Config.from_hf(config_json)`, `Model(config, dtype)`, `WEIGHTS` (our name -> transform of the checkpoint's tensors),
`ignored(config)` (patterns of tensors that may be left unread) and `TINY` (a config for tests). A config names each layer's heads
(`attention_shapes`) and windows (`attention_windows`).

A model whose layers run through `residual.through`, whose token vectors are `Model.embedding` and whose config has `hidden_size` may have
an EAGLE-3 head beside it (`eagle.py`, which is no model of its own).
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxinfer.config import ConfigError

NOT_MODELS = frozenset({"__init__", "eagle", "experts", "find", "graph", "hf", "layers", "residual", "rope", "weights"})
SHAPES = Path(__file__).with_name("shapes.json")


def model_types() -> tuple[str, ...]:
    """The model types that exist."""
    return tuple(sorted(file.stem for file in Path(__file__).parent.glob("*.py") if file.stem not in NOT_MODELS))


def find(model_type: object) -> ModuleType:
    """The module of a model type, as config.json names it.

    Raises:
        ConfigError: there is none; the message lists those that exist and the nearest name.
    """
    known = model_types()
    name = model_type.replace("-", "_") if isinstance(model_type, str) else ""
    if name not in known:
        there = f"there are: {', '.join(known)}{_nearest(name, known)}"
        raise ConfigError(f"config.json: model_type {model_type!r} is not implemented; {there}")
    return importlib.import_module(f"jaxinfer.models.{name}")


def known_shapes() -> dict[str, dict[str, Any]]:
    """Well-known models that can run here by name, each like the config.json of its checkpoint."""
    return {name: values for name, values in _all_shapes().items() if values["model_type"] in model_types()}


def is_shape(name: str) -> bool:
    """Whether a well-known model has this name, also one whose architecture is not implemented."""
    return name in _all_shapes()


def shapes_without_model() -> tuple[str, ...]:
    """Names of well-known models whose architecture is not implemented."""
    return tuple(name for name in _all_shapes() if name not in known_shapes())


def find_shape(name: str) -> Mapping[str, Any]:
    """The config of a well-known model.

    Raises:
        ConfigError: the name is not in the list, or its architecture is not implemented; the message says what there is.
    """
    shapes = known_shapes()
    if name in shapes:
        return shapes[name]
    if is_shape(name):
        model_type = _all_shapes()[name]["model_type"]
        raise ConfigError(
            f"{name} has model_type {model_type!r}, which is not implemented here yet (there are: {', '.join(model_types())});"
            f" shapes that can run: {', '.join(shapes)}"
        )
    raise ConfigError(f"no shape is known as {name!r}; there are: {', '.join(shapes)}{_nearest(name, tuple(shapes))}")


@cache
def _all_shapes() -> dict[str, dict[str, Any]]:
    return json.loads(SHAPES.read_text(encoding="utf-8"))


def _nearest(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
