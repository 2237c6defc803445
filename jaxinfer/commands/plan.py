"""`jaxinfer plan`: compile a model for a slice that is not there, and say what it needs, how fast it would be and what to do next.

Exit codes: 0 it fits, 1 it does not (or the compiling process died), 2 a flag that cannot work or a compiler that is not installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from jaxinfer.config import KV_DTYPES, ConfigError, EngineConfig, engine_settings, parse_count
from jaxinfer.config import add_arguments as add_settings
from jaxinfer.console import StageBar, remark, warn

HELP = "what a model needs on a slice that is not there: memory from the compiler, predicted speed and cost"
GOALS = ("throughput", "latency", "cost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--slice", required=True, action="append", metavar="NAME",
        help="v5e-8, v6e-4, v5p-8 (cores: 4 chips), tpu7x-8, h100x8, h200x1, b200x8, cpu-1; may be repeated, or several with commas",
    )  # fmt: skip
    group.add_argument("--goal", choices=GOALS, default=GOALS[0], help=f"what the mesh is chosen for [{GOALS[0]}]")
    group.add_argument("--context", type=_count, metavar="N", help="tokens of a sequence, prompt and output [8k, or the model's own]")
    group.add_argument("--output", type=_count, metavar="N", help="how many of them are generated [256, at most a quarter]")
    group.add_argument("--concurrency", type=int, metavar="N", help="sequences of full length that must fit at once [as many as do]")
    group.add_argument("--kv", choices=KV_DTYPES, help="short for --kv-dtype")
    group.add_argument("--price", type=float, metavar="USD", help="price of one chip for an hour, for the cost of a million tokens")
    group.add_argument("--no-compile", action="store_true", help="arithmetic only, in seconds; what programs need is guessed")
    group.add_argument("--all", action="store_true", help="compile every program, not only those that set the memory")
    group.add_argument("--json", action="store_true", help="one JSON object for each slice")
    group.add_argument(
        "--autotune", metavar="FILE",
        help="XLA's choices of GPU kernels, kept in the bundle; a card writes them for the programs of a bundle made without:"
        " XLA_FLAGS=--xla_gpu_dump_autotune_results_to=FILE python -m jaxinfer bench startup --bundle DIR --compare --compile-threads 1"
        " --compilation-cache off",
    )  # fmt: skip
    add_settings(parser, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Plan each slice, one process after the other; see the module for exit codes."""
    from jaxinfer.planner import planning, text

    settings, slices = _settings(args), _names(args.slice)
    model = settings.pop("model", "demo")
    wanted = _wanted(args, settings)
    if wanted.bundle is not None and len(slices) > 1:
        raise ConfigError(f"--bundle {wanted.bundle} holds programs for one slice; --slice names {len(slices)}")
    plans = []
    for name in slices:
        remark(f"planning {model} for {name}")
        with StageBar() as bar:
            made = planning.run(model, name, wanted, settings, bar)
        plans.append(made)
        if args.json:
            print(json.dumps(made.fields(), ensure_ascii=False), flush=True)
        elif made.refused:
            warn(f"error: {made.failure}")
        else:
            text.show(made, _console())
    if len(plans) > 1 and not args.json:
        text.compare(plans, _console())
    return 2 if any(made.refused for made in plans) else int(not all(made.fits for made in plans))


def _wanted(args: argparse.Namespace, settings: dict[str, Any]) -> Any:
    from jaxinfer.planner.outcome import Wanted

    context = args.context or settings.pop("max_model_len", None)
    return Wanted(
        context=context, concurrency=args.concurrency, output=args.output, goal=args.goal, price=args.price,
        mesh=settings.pop("mesh", None), compile=not args.no_compile, all=args.all, bundle=settings.pop("bundle", None),
        autotune=args.autotune,
    )  # fmt: skip


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The engine's settings that were given."""
    found = {name: value for name, value in vars(args).items() if name in engine_settings()}
    return found | ({"kv_dtype": args.kv} if args.kv is not None else {})


def _names(given: list[str]) -> list[str]:
    return [name for part in given for name in part.split(",") if name]


def _console() -> Any:
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110, highlight=False)


def _count(text: str) -> int:
    try:
        return parse_count(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
