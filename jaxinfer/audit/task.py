"""A score of the user's own: a command that reads what a model answered and prints numbers.

The command gets one JSON line {"prompt", "completion", "output"} for each document on stdin (completion is null where the line has none,
a conversation is given as the text that the model reads) and prints one number for all of them, or one number a line for each; a score is
their mean. It runs without a shell, once for the reference and once for each scheme; its stderr is the user's. This file does not know
models.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfer.config import ConfigError

HOW = "it must print one number, or one number for each line that it was given"


@dataclass(frozen=True)
class Score:
    """What the command said: its mean; and, where it scored each document, the share whose number is exactly the reference's."""

    value: float
    same: float | None = None


@dataclass(frozen=True)
class Metric:
    """A command, split into words."""

    command: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Metric:
        """Split a command line as a POSIX shell would, without expanding anything.

        Raises:
            ConfigError: an open quote, no word, or a program that is not there.
        """
        try:
            words = tuple(shlex.split(text))
        except ValueError as error:
            raise ConfigError(f"--metric {text}: {error}") from None
        if not words or shutil.which(words[0]) is None:
            raise ConfigError(f"--metric {text!r}: no such program; give a command, for example 'python3 score.py'")
        return cls(words)

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
        """The numbers that the command prints: one, or one for each record.

        Raises:
            ConfigError: the command cannot be started or fails, or prints anything else.
        """
        name = f"--metric {shlex.join(self.command)}"
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        try:
            done = subprocess.run(  # noqa: S603  the user names the program
                self.command, input=lines.encode(), stdout=subprocess.PIPE, check=False
            )
        except OSError as error:
            raise ConfigError(f"{name}: {error.strerror}") from None
        if done.returncode:
            raise ConfigError(f"{name} ended with exit code {done.returncode}")
        words = done.stdout.decode("utf-8", errors="replace").split()
        try:
            numbers = tuple(float(word) for word in words)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}; {HOW}") from None
        if len(numbers) not in (1, len(records)) or not all(map(math.isfinite, numbers)):
            raise ConfigError(f"{name} printed {len(numbers)} numbers for {len(records)} lines, or one that is not finite; {HOW}")
        return numbers


def score(numbers: Sequence[float], reference: Sequence[float]) -> Score:
    """A model's score beside the reference's numbers (its own for the reference itself)."""
    same = sum(a == b for a, b in zip(numbers, reference, strict=True)) / len(numbers) if len(numbers) == len(reference) > 1 else None
    return Score(sum(numbers) / len(numbers), same)
