"""What the terminal commands share: flags for sampling and the bar that shows a model loading.

Nothing here reaches jax, and everything but `print_table` speaks to stderr: stdout belongs to results.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

from jaxinfer import config


def _count(text: str) -> int:
    try:
        return config.parse_count(text)
    except config.ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class SamplingFlag(NamedTuple):
    """One field of `SamplingParams` as a flag; `kind` is its parser, or "list" (may be repeated) or "switch"."""

    name: str
    kind: Any
    help: str


SAMPLING_FLAGS = (
    SamplingFlag("max_tokens", _count, "most tokens to generate"),
    SamplingFlag("min_tokens", _count, "tokens before the end-of-sequence token is allowed"),
    SamplingFlag("temperature", float, "0 always takes the most likely token"),
    SamplingFlag("top_p", float, "draw among the most likely tokens that hold this share of the probability"),
    SamplingFlag("top_k", int, "draw among this many most likely tokens; 0 is off"),
    SamplingFlag("min_p", float, "drop tokens below this share of the most likely one's probability"),
    SamplingFlag("seed", int, "makes sampled text repeatable"),
    SamplingFlag("presence_penalty", float, "lowers tokens that occurred"),
    SamplingFlag("frequency_penalty", float, "lowers tokens by how often they occurred"),
    SamplingFlag("repetition_penalty", float, "divides the logits of tokens that occurred, prompt included"),
    SamplingFlag("stop", "list", "text at which to stop; may be repeated"),
    SamplingFlag("ignore_eos", "switch", "go on after an end-of-sequence token"),
)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `SAMPLING_FLAGS`; what is not given is left to the model's own defaults."""
    group = parser.add_argument_group("sampling", "Defaults are the model's own (generation_config.json), otherwise OpenAI's.")
    for flag in SAMPLING_FLAGS:
        name = "--" + flag.name.replace("_", "-")
        shared: dict[str, Any] = {"dest": flag.name, "default": argparse.SUPPRESS, "help": flag.help}
        if flag.kind == "switch":
            group.add_argument(name, action="store_true", **shared)
        elif flag.kind == "list":
            group.add_argument(name, action="append", metavar="TEXT", **shared)
        else:
            group.add_argument(name, type=flag.kind, metavar="X" if flag.kind is float else "N", **shared)


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling fields that were given on the command line."""
    return {flag.name: getattr(args, flag.name) for flag in SAMPLING_FLAGS if hasattr(args, flag.name)}


def remark(text: str) -> None:
    """Say something beside the result, dimmed, if a person sits at stderr."""
    if sys.stderr.isatty():
        from rich.console import Console

        Console(stderr=True).print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """Tell on stderr what went wrong while the command goes on."""
    sys.stderr.write(f"jaxinfer: {text}\n")


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """A result on stdout: the first row is the heading, the first column says what a row is. Not folded where nobody sits at a terminal."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=SIMPLE, pad_edge=False)
    for number, heading in enumerate(rows[0]):
        table.add_column(Text(heading), justify="right" if number else "left", overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 240, highlight=False).print(table)


def redact(text: str) -> str:
    """The text with what looks like a secret replaced: passwords in addresses, keys and tokens after their names."""
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    return re.sub(r"(?i)([\w-]*(?:(?<![a-z])(?:key|token)|secret|passw(?:or)?d)(?![a-z])\w*(?:\s*=\s*|\s+))(?!-)\S+", r"\1***", text)


MANY_PARTS = 1 << 20  # more than so many parts of a stage are bytes


class StageBar:
    """An engine's `progress`: shows on stderr, if that is a terminal, how far a model is read, sharded and compiled."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stages: dict[str, Any] = {}

    def __enter__(self) -> StageBar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description:>8}"), BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Note that `done` of `total` parts (programs, or bytes) of a stage are over."""
        if self._bar is None:
            return
        amount = f"{done}/{total}" if total < MANY_PARTS else f"{done >> 20}/{total >> 20} MiB"
        if stage not in self._stages:
            self._stages[stage] = self._bar.add_task(stage, total=total, amount=amount)
        self._bar.update(self._stages[stage], completed=done, total=total, amount=amount)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
