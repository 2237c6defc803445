"""`jaxinfer models`: what can run here: architectures, the embedded model, and shapes known by name. Needs no device."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from jaxinfer.console import warn
from jaxinfer.models import find

HELP = "list supported architectures, the embedded model and shapes known by name"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    shapes = {name: _size(values) for name, values in find.known_shapes().items()}
    found = {"architectures": find.model_types(), "embedded": _embedded(), "shapes": shapes}
    print(json.dumps(found) if args.json else _text(found))
    return 0


def _embedded() -> list[dict[str, Any]]:
    from jaxinfer.checkpoint import hub, read

    try:
        folder = hub.resolve("demo")
        return [{"name": "demo", "model_type": read.read_config(folder)["model_type"], **_size(read.read_config(folder))}]
    except ValueError as error:
        warn(f"the embedded model is missing: {error}")
        return []


def _size(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters and context of a model, from its config.json alone."""
    import jax.numpy as jnp

    from jaxinfer.models.graph import Graph

    module = find.find(values.get("model_type"))
    config = module.Config.from_hf(values)
    return {"parameters": Graph.of(module, config, jnp.bfloat16).nbytes // 2, "context": config.max_positions}


def _text(found: dict[str, Any]) -> str:
    lines = [
        "Architectures (model_type of a Hugging Face config.json):", f"  {', '.join(found['architectures'])}",
        "", "Embedded (--model NAME works offline):", *(_line(model["name"], model) for model in found["embedded"]),
        "", "Shapes (--load-format random --model NAME, for benchmarks):", *(_line(name, size) for name, size in found["shapes"].items()),
        *_waiting(),
        "", "Any other: --model FOLDER or --model OWNER/NAME (Hugging Face) of a supported architecture.",
    ]  # fmt: skip
    return "\n".join(lines)


def _waiting() -> list[str]:
    """Shapes known by name that cannot run yet."""
    waiting = find.shapes_without_model()
    return ["", f"Known by name, not implemented yet: {', '.join(waiting)}"] if waiting else []


def _line(name: str, size: Mapping[str, Any]) -> str:
    count = size["parameters"]
    parameters = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    return f"  {name:24} {parameters:>9} parameters   {count * 2 / 2**30:7.2f} GiB in bfloat16   context {size['context']}"
