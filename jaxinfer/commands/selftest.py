"""`jaxinfer selftest R4`: check one promise of reliability. Each is a file `jaxinfer/selftest/r<number>.py` with `PROMISE`, `ENGINE`
(whether it runs one), `add_arguments(parser)` and `run(args) -> Verdict`.

The folder is listed. One JSON object goes to stdout: what was promised, counted and found, and with what; the exit code is 1 if the
promise did not hold. This file does not know what any row checks.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import platform
import re
import time
from types import ModuleType
from typing import Any

from jaxinfer import selftest
from jaxinfer.bench.rows import stamp

HELP = "check what is promised under load, faults and bad input"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each row."""
    names = parser.add_subparsers(title="rows", metavar="ROW", prog="jaxinfer selftest", required=True)
    for name, module in rows().items():
        usage = f"jaxinfer selftest {name} [flags]"
        own = names.add_parser(name, usage=usage, help=module.PROMISE, description=module.PROMISE, allow_abbrev=False)
        own.add_argument("--quick", action="store_true", help="a small figure, for a first look")
        own.add_argument("--seed", type=int, default=0, help="of everything that is drawn [0]")
        module.add_arguments(own)
        own.set_defaults(row=name, module=module)


def run(args: argparse.Namespace) -> int:
    """Check the chosen row and print what was found; 1 if the promise did not hold."""
    begun = time.perf_counter()
    verdict = args.module.run(args)
    seconds = round(time.perf_counter() - begun, 2)
    found: dict[str, Any] = {"row": args.row, "promise": args.module.PROMISE, "seed": args.seed, "quick": args.quick}
    found |= {"passed": verdict.passed, "seconds": seconds, "counts": verdict.counts}
    stamped = stamp(None if args.module.ENGINE else "none")
    versions = {"python": platform.python_version(), **{name: stamped.pop(name) for name in ("jax", "jaxinfer")}}
    print(json.dumps(found | {"versions": versions} | stamped, ensure_ascii=False))
    return int(not verdict.passed)


def rows() -> dict[str, ModuleType]:
    """Every row by name, in the order of their numbers; their modules import jax only when they run."""
    names = (item.name for item in pkgutil.iter_modules(selftest.__path__))
    numbers = sorted(int(name[1:]) for name in names if re.fullmatch(r"r\d+", name))
    return {f"R{number}": importlib.import_module(f"{selftest.__name__}.r{number}") for number in numbers}
