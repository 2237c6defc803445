"""R14, a save is all or nothing: the converter is killed with SIGKILL at random moments while it replaces one model by another.

A process of its own converts the model again and again into one folder, in turn by each of three recipes, so that most of its time is
spent writing; after a random while it is killed. Then the folder must be one of the three whole: every file of its manifest there and
unchanged, no other file, and weights that load. What the killed process left beside it must be gone after the next conversion.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

from jaxinfer.console import remark
from jaxinfer.selftest.stand import Verdict

PROMISE = "kill -9 at any moment of a conversion leaves the old tree or the new one"
ENGINE = False
KILLS = {"long": 200, "quick": 5}
SPAN = 1.5  # seconds within which a kill comes
READY = "converting"


class Recipe(NamedTuple):
    """One way to convert."""

    scheme: str
    kind: Literal["safetensors", "orbax"]


RECIPES = (Recipe("int8", "safetensors"), Recipe("fp8", "safetensors"), Recipe("w8a8", "orbax"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this row."""
    parser.add_argument("--model", default="demo", help="an unquantised model to convert [demo]")
    parser.add_argument("--kills", type=int, help="conversions to kill [200; 5 with --quick]")
    parser.add_argument("--loop", metavar="DIR", help="convert into this folder until killed")


def run(args: argparse.Namespace) -> Verdict:
    """Kill and look."""
    if args.loop is not None:
        loop(args.model, Path(args.loop))
    with tempfile.TemporaryDirectory() as folder:
        return check(args.model, args.kills or KILLS["quick" if args.quick else "long"], random.Random(args.seed), Path(folder))


def loop(model: str, target: Path) -> None:
    """Convert for ever; says so when the first tree is there."""
    from jaxinfer.checkpoint import hub
    from jaxinfer.checkpoint.convert import convert
    from jaxinfer.models.graph import Quantization

    source, said = hub.resolve(model), False
    while True:
        for recipe in RECIPES:
            convert(source, target, Quantization.parse(recipe.scheme), kind=recipe.kind, overwrite=True)
            if not said:
                sys.stdout.write(READY + "\n")
                sys.stdout.flush()
                said = True


def check(model: str, kills: int, draw: random.Random, folder: Path) -> Verdict:
    """Kill `kills` converters, each in a process of its own, and look at what is there after each."""
    target, found, faults = folder / "model", Counter[str](), []
    for number in range(kills):
        command = [sys.executable, "-m", "jaxinfer", "selftest", "R14", "--model", model, "--loop", str(target)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  the flags are our own
            if process.stdout is None or process.stdout.readline().strip() != READY:
                raise RuntimeError(f"the converter ended with {process.wait()} before it had converted once")
            time.sleep(draw.uniform(0, SPAN))
            process.kill()
        left = [path.name for path in folder.iterdir() if path != target]
        found["killed while writing"] += bool(left)
        found["left by more than one"] += len(left) > 1
        try:
            found[f"whole: {whole(target)}"] += 1
        except Exception as error:
            faults.append(f"kill {number}: {type(error).__name__}: {error}")
        remark(f"{number + 1} of {kills} kills, {len(faults)} faults")
    trees = sum(count for name, count in found.items() if name.startswith("whole"))
    passed = not faults and trees == kills and not found["left by more than one"]
    return Verdict({"kills": kills, **found, "faults": len(faults), "first_faults": faults[:5]}, passed)


def whole(folder: Path) -> str:
    """Which recipe made a folder, if it is one whole tree.

    Raises:
        CheckpointError: a file is not what the manifest says. ValueError: a file too many, or one that no recipe writes.
    """
    import json

    import numpy as np

    from jaxinfer.checkpoint import manifest, read
    from jaxinfer.models import find
    from jaxinfer.models.graph import Graph
    from jaxinfer.quant.qarray import QSpec
    from jaxinfer.sharding import make_mesh

    values = read.read_config(folder)
    manifest.require(folder)
    manifest.verify(folder, weights=True)
    vouched, there = set(json.loads((folder / manifest.NAME).read_text())["files"]), set(manifest.listed(folder))
    if there != vouched:
        raise ValueError(f"files that no manifest lists, or the other way round: {sorted(there ^ vouched)[:3]}")
    module = find.find(values.get("model_type"))
    graph = read.as_stored(folder, Graph.of(module, module.Config.from_hf(read.of_model(values)), np.float32))
    weights = read.load(folder, graph, make_mesh({}))
    schemes = {spec.scheme for spec in graph.specs if isinstance(spec, QSpec)}
    if len(weights) != len(graph.names) or schemes - {recipe.scheme for recipe in RECIPES} or len(schemes) != 1:
        raise ValueError(f"weights of schemes {sorted(schemes)}")
    return schemes.pop()
