"""How much of a chip's peak is reached: rows of `efficiency.json`, each with where it was measured or that it is assumed.

A row is for a chip by name or, where that has none, for its platform. Shares are of the vendor's figures in `devices.CHIPS`, so that a
better kernel or a measurement on another chip is a new row and no code. Plain Python.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any, NamedTuple

from jaxinfer.devices import Chip

TABLE = Path(__file__).with_name("efficiency.json")


class Row(NamedTuple):
    """One row: its numbers and where they come from."""

    values: dict[str, Any]
    source: str

    @property
    def measured(self) -> bool:
        """Whether the numbers were measured on this very chip."""
        return self.source.startswith("measured")

    def at(self, rows: float) -> float:
        """The row's points at so many rows, interpolated over their logarithm; the outermost points hold beyond."""
        name = "points" if "points" in self.values else "points_us"
        points = sorted((int(key), float(value)) for key, value in self.values[name].items())
        if rows <= points[0][0]:
            return points[0][1]
        for (low, first), (high, second) in pairwise(points):
            if rows <= high:
                place = log(rows / low) / log(high / low) if name == "points" else (rows - low) / (high - low)
                return first + (second - first) * place
        return points[-1][1]

    def number(self, name: str) -> float:
        """A number of the row."""
        return float(self.values[name])


def find(chip: Chip, what: str, *, implementation: str = "*", weights: str = "*") -> Row:
    """The row for a chip: its own, else its platform's; the most exact that there is.

    Raises:
        LookupError: there is none.
    """
    for place in (chip.name, chip.platform):
        for row in table():
            if row["chip"] != place or row["what"] != what:
                continue
            if row.get("implementation", "*") in ("*", implementation) and row.get("weights", "*") in ("*", weights):
                return Row(row, row["source"])
    raise LookupError(f"efficiency.json has no row of {what} for {chip.name} ({implementation}, {weights} weights); add one")


@cache
def table() -> tuple[dict[str, Any], ...]:
    """All rows, in order."""
    return tuple(json.loads(TABLE.read_text(encoding="utf-8")))
