"""Results of benchmarks: JSON rows that say where, when and with what they were measured.

A benchmark makes one `Report`, adds rows (plain dictionaries) as they are measured, and finishes it. With `--json` each row goes to
stdout at once, otherwise a table is printed at the end; `--out` appends the rows to a file. This file does not know what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import jaxinfer
from jaxinfer.console import redact, warn

WIDE = 150
BUSY = 0.2
STAMP = ("device", "host", "host_busy", "jax", "jaxinfer", "commit", "date", "command")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--json`, `--out` and `--repeat`."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object per row on stdout")
    group.add_argument("--out", type=Path, metavar="FILE", help="append the rows as JSON lines to a file too")
    group.add_argument("--repeat", type=int, default=3, metavar="N", help="measurements of each row; mostly their median counts [3]")


def stamp(device: str | None = None) -> dict[str, Any]:
    """What a figure means nothing without: device, host, versions, commit, date, command. Unless the device is given, jax is asked,
    which starts its backend. The command is without `--out`: where rows go says nothing of them."""
    if device is None:
        import jax

        from jaxinfer import devices

        device = devices.label(jax.devices()[0])
    date, command = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), re.sub(r" --out[ =]\S+", "", " ".join(["jaxinfer", *sys.argv[1:]]))
    values = (device, host(), busy(), version("jax"), jaxinfer.__version__, commit(), date, redact(command))
    return dict(zip(STAMP, values, strict=True))


def host() -> str:
    """The processor and how many of its cores may be used."""
    return f"{_processor()}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def busy(seconds: float = 0.3) -> float | None:
    """Share of the processors that other programs use (this one sleeps), 0 to 1; None where the system does not say."""
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    if before is None or after is None or after[1] == before[1]:
        return None
    share = round(1 - (after[0] - before[0]) / (after[1] - before[1]), 2)
    if share > BUSY:
        warn(f"other programs use {share:.0%} of the processors: times measured now mean little, ratios not much more")
    return share


def commit() -> str | None:
    """The commit of the source tree, with "-dirty" if files differ from it; None outside of one."""
    folder = Path(jaxinfer.__file__).parent
    try:
        command = [shutil.which("git") or "git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)  # noqa: S603  nothing of it comes from outside
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


class Report:
    """Rows of one benchmark run; a context manager that prints the table when it is left without an error."""

    def __init__(self, benchmark: str, args: argparse.Namespace, device: str | None = None) -> None:
        self.stamp = {"benchmark": benchmark, **stamp(device)}
        self.rows: list[dict[str, Any]] = []
        self._json: bool = args.json
        self._out: Path | None = args.out

    def add(self, **row: Any) -> None:
        """Take one row and write it where rows go."""
        self.rows.append(row)
        line = json.dumps(row | self.stamp, ensure_ascii=False)
        if self._json:
            print(line, flush=True)
        if self._out is not None:
            with self._out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and not self._json:
            print(", ".join(f"{name} {self.stamp[name]}" for name in STAMP[:-1]))
            print(table(self.rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned columns; rows with the same keys share a heading. What would be too wide is turned on its side."""
    lines: list[str] = []
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(name for name, value in row.items() if not isinstance(value, list)), []).append(row)
    for names, members in groups.items():
        cells = [list(names), *([_cell(row[name]) for name in names] for row in members)]
        if sum(max(map(len, column)) + 2 for column in zip(*cells, strict=True)) > WIDE:
            cells = [list(line) for line in zip(*cells, strict=True)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["", *("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells)]
    return "\n".join(lines[1:])


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Repeated seconds as fields of a row: the median and all of them."""
    return {"seconds": median(values), "runs": [round(value, 6) for value in values]}


def _ticks() -> tuple[int, int] | None:
    """Idle and all processor time since the system started, in ticks."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except (OSError, ValueError):
        return None
    return fields[3] + fields[4], sum(fields)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
