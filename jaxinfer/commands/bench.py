"""`jaxinfer bench NAME`: run a benchmark. Each is a file `jaxinfer/bench/<name>.py` with `HELP`, `add_arguments(parser)` and `run(args)`.

The folder is listed, its helpers left out. This file does not know what any benchmark measures.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from types import ModuleType

from jaxinfer import bench

HELP = "measure speed, as JSON rows or a table"
HELPERS = frozenset({"ceilings", "engines", "forced", "kernel_goals", "kernel_peers", "peer_hf", "rows", "turns", "variants", "workloads"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each benchmark."""
    names = parser.add_subparsers(title="benchmarks", metavar="NAME", prog="jaxinfer bench", required=True)
    for name, module in benchmarks().items():
        usage = f"jaxinfer bench {name} [flags]"
        own = names.add_parser(name, usage=usage, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(own)
        own.set_defaults(benchmark=module)


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark; its exit code."""
    return args.benchmark.run(args)


def benchmarks() -> dict[str, ModuleType]:
    """Every benchmark by name; their modules import jax only when they run."""
    names = (item.name for item in pkgutil.iter_modules(bench.__path__))
    return {name: importlib.import_module(f"{bench.__name__}.{name}") for name in names if name not in HELPERS}
