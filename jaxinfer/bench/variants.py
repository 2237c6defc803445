"""Engines that differ in a setting or two and are measured beside each other: `--beside overlap=off,prefix-caching=off`.

All of them live on the device at once, so each gets its share of the memory unless the size of the KV pool is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from jaxinfer.config import ConfigError, EngineConfig, MeshShape, add_arguments, engine_settings, from_arguments
from jaxinfer.engine import policies
from jaxinfer.quant.rules import Quantization

BASE = "as given"


@dataclass(frozen=True)
class Variant:
    """What it is called in rows, and its engine's settings."""

    name: str
    config: EngineConfig


def add_beside_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--beside`."""
    parser.add_argument(
        "--beside", action="append", default=[], metavar="SETTING=VALUE",
        help="measure the engine with this setting too, in turns; may be repeated; several settings at once: overlap=off,deterministic=on",
    )  # fmt: skip


def read(beside: Sequence[str], values: Mapping[str, Any]) -> list[Variant]:
    """The engine that `values` describe, first, and those that are to be measured beside it.

    Raises:
        ConfigError: a setting that does not exist (those that do are listed), a bad value, or a variant given twice.
    """
    variants = [Variant(BASE, _checked(values))]
    for text in beside:
        try:
            changes = _changes(text)
            name = ",".join(f"{setting.replace('_', '-')}={value}" for setting, value in changes.items())
            if name in {variant.name for variant in variants}:
                raise ConfigError("given twice; once is enough")
            variants.append(Variant(name, _checked({**values, **_parsed(changes)})))
        except ConfigError as error:
            raise ConfigError(f"--beside {text}: {error}") from None
    return [Variant(variant.name, _with_its_share(variant.config, len(variants))) for variant in variants]


def _changes(text: str) -> dict[str, str]:
    """`a=1,b-c=2` as names and values. A mesh has commas and equals signs in its value."""
    known, changes = engine_settings(), dict[str, str]()
    for part in text.split(","):
        flag, equals, value = part.partition("=")
        name = flag.strip().removeprefix("--").replace("-", "_")
        if name in MeshShape._fields and next(reversed(changes), None) == "mesh":
            changes["mesh"] += f",{part}"
        elif name not in known:
            raise ConfigError(f"{flag!r} is no setting; there are: {', '.join(sorted(known)).replace('_', '-')}")
        elif not equals:
            raise ConfigError(f"write {flag}=VALUE")
        elif name in changes:
            raise ConfigError(f"{flag} is given twice")
        else:
            changes[name] = value
    return changes


class _Reader(argparse.ArgumentParser):
    """Raises where argparse would leave the program."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parsed(changes: Mapping[str, str]) -> dict[str, Any]:
    """Values as the command line reads them."""
    reader = _Reader(add_help=False, allow_abbrev=False)
    add_arguments(reader, EngineConfig)
    return vars(reader.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in changes.items()]))


def _checked(values: Mapping[str, Any]) -> EngineConfig:
    """Settings, with those names looked up that an engine would look up late."""
    config = from_arguments(EngineConfig, values)
    policies.find(config.scheduler.policy)
    if config.model.quantize:
        Quantization.parse(config.model.quantize)
    return config


def _with_its_share(config: EngineConfig, engines: int) -> EngineConfig:
    if config.cache.kv_tokens is not None:
        return config
    return replace(config, cache=replace(config.cache, memory_fraction=config.cache.memory_fraction / engines))
