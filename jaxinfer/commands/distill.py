"""`jaxinfer distill`: teach a draft what a target model says to your own prompts; the result serves with `--speculate draft`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from jaxinfer import prompts
from jaxinfer.bench.rows import stamp
from jaxinfer.config import DTYPES, ConfigError, MeshShape, parse_count, parse_mesh
from jaxinfer.console import StageBar, print_table

HELP = "train a draft for speculative decoding on your own prompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    group = parser.add_argument_group("models and texts")
    group.add_argument("--target", required=True, metavar="MODEL", help="who is drafted for: folder, repository or 'demo'")
    group.add_argument("--revision", help="branch, tag or commit of the target's repository")
    named = "who learns: a model of the same tokenizer, the config.json of a new one, or another kind of student by its name"
    group.add_argument("--draft", required=True, metavar="DRAFT", help=named)
    lines = 'JSON lines {"prompt"} or {"messages"}, with an optional {"completion"}; the target answers where there is none'
    group.add_argument("--data", required=True, type=Path, metavar="FILE", help=lines)
    group.add_argument("--out", required=True, type=Path, metavar="DIR", help="the new folder, for --draft-model")
    group.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    group.add_argument("--state", type=Path, metavar="DIR", help="what the run keeps to go on after it was killed [OUT.state]")
    group.add_argument("--max-model-len", type=_count, metavar="N", help="tokens of a prompt and its answer [1024, or the target's own]")
    group.add_argument("--max-tokens", type=int, default=128, metavar="N", help="of an answer [128]")
    group.add_argument("--temperatures", default="0,0.7", metavar="LIST", help="each prompt is answered at each of them [0,0.7]")
    kept = "the target's answers: written there, or read if it exists, so that several drafts learn from the same"
    group.add_argument("--answers", type=Path, metavar="FILE", help=kept)
    held = "JSON lines to measure on, whose prompts are not learned [a share of --data]"
    group.add_argument("--held-out-data", type=Path, metavar="FILE", help=held)
    group.add_argument("--held-out", type=float, default=0.1, metavar="SHARE", help="of the lines, for measuring [0.1]")
    learned = "tokens to learn: all adds the prompts' [completion]"
    group.add_argument("--learn", choices=("completion", "all"), default="completion", help=learned)
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=300, metavar="N", help="[300]")
    limit = "of learning, at most; the rate then falls with the clock [no limit]"
    group.add_argument("--seconds", type=float, metavar="S", help=limit)
    group.add_argument("--batch", type=int, default=8, metavar="ROWS", help="rows of packed texts in a step [8]")
    group.add_argument("--learning-rate", type=float, default=1e-3, metavar="X", help="the highest, after a short rise [0.001]")
    group.add_argument("--seed", type=int, default=0, help="of everything that is drawn [0]")
    group.add_argument("--save-seconds", type=float, default=60.0, metavar="S", help="between two states that are kept [60]")
    group.add_argument("--mesh", type=_mesh, default=MeshShape(), help="as for serve: data=2,tensor=4")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of the arithmetic; what is learned is float32 [auto]")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")


def run(args: argparse.Namespace) -> int:
    """Distil and show what came of it."""
    lines = prompts.read(args.data)
    held = None if args.held_out_data is None else prompts.read(args.held_out_data, "--held-out-data")

    from jaxinfer.train import distill

    with StageBar() as bar:
        figures = distill.distill(settings_of(args), distill.Data(lines, held), stamp, bar)
    if args.json:
        print(json.dumps(figures))
    else:
        print_table(f"{figures['target']}: drafts that stand, of held-out answers", rows(figures))
        way = "eagle" if args.draft == "eagle" else "draft"
        print(f"written to {args.out}: serve --model {args.target} --speculate {way} --draft-model {args.out}")
    return 0


def settings_of(args: argparse.Namespace) -> Any:
    """The flags as settings.

    Raises:
        ConfigError: a value that makes no sense.
    """
    from jaxinfer.train.answers import Wanted
    from jaxinfer.train.distill import Settings
    from jaxinfer.train.learner import Recipe

    try:
        temperatures = tuple(float(part) for part in args.temperatures.split(","))
    except ValueError:
        raise ConfigError(f"--temperatures {args.temperatures!r}: write numbers, for example 0,0.7") from None
    return Settings(
        target=args.target, draft=args.draft, out=args.out, state=args.state or args.out.with_name(args.out.name + ".state"),
        revision=args.revision, overwrite=args.overwrite, mesh=args.mesh, dtype=args.dtype, max_model_len=args.max_model_len,
        save_seconds=args.save_seconds, answers=args.answers,
        wanted=Wanted(args.max_tokens, temperatures, args.held_out, args.seed, args.learn),
        recipe=Recipe(args.steps, args.batch, args.learning_rate, seed=args.seed, seconds=args.seconds),
    )  # fmt: skip


def rows(figures: dict[str, Any]) -> list[list[str]]:
    """One line for each temperature, before and after."""
    count = len(figures["after"][0]["stand"])
    found = [["", "tokens", "first draft stands", *(f"{at + 1} in a row" for at in range(count)), "tokens a step"]]
    for before, after in zip(figures["before"], figures["after"], strict=True):
        warmth = f"temperature {after['temperature']:g}" if after["temperature"] else "greedy"
        for name, it in (("before", before), ("after", after)):
            shares = [f"{share:.1%}" for share in (it["agreement"], *it["stand"])]
            found.append([f"{warmth}, {name}", f"{it['tokens_compared']:,}", *shares, f"{it['tokens_per_step']:.2f}"])
    return found


def _count(text: str) -> int:
    try:
        return parse_count(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _mesh(text: str) -> MeshShape:
    try:
        return parse_mesh(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
