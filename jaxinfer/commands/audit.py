"""`jaxinfer audit NAME`: run an audit. Each is a file `jaxinfer/audit/<name>.py` with `HELP`, `add_arguments(parser)` and
`run(args, stamp) -> int`.

The folder is listed, its helpers left out. This file does not know what any audit compares.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from types import ModuleType

from jaxinfer import audit
from jaxinfer.bench.rows import stamp

HELP = "measure what a setting costs in quality, on your own data"
HELPERS = frozenset({"forced", "generation", "page", "plots", "report", "schemes", "session", "statistics", "task"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each audit."""
    names = parser.add_subparsers(title="audits", metavar="NAME", prog="jaxinfer audit", required=True)
    for name, module in audits().items():
        usage = f"jaxinfer audit {name} [flags]"
        own = names.add_parser(name, usage=usage, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(own)
        own.set_defaults(module=module)


def run(args: argparse.Namespace) -> int:
    """Run the chosen audit; its exit code."""
    return args.module.run(args, stamp)


def audits() -> dict[str, ModuleType]:
    """Every audit by name; their modules import jax only when they run."""
    names = (item.name for item in pkgutil.iter_modules(audit.__path__))
    return {name: importlib.import_module(f"{audit.__name__}.{name}") for name in names if name not in HELPERS}
