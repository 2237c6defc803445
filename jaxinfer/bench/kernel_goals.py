"""What the attention kernels are to reach on the cards they were written for, by op and case of `BENCH`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

CARDS = re.compile(r"\bH[12]00\b")
JUDGED = "gpu"  # the implementation that the goals are for


class Goal(NamedTuple):
    """A field of a row and the least or the most it may be."""

    field: str
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        return f"{self.field} >= {self.least:g}" if self.most is None else f"{self.field} <= {self.most:g}"

    def reached(self, row: Mapping[str, Any]) -> bool | None:
        """Whether a row reaches it; None where the field could not be measured."""
        value = row.get(self.field)
        if value is None:
            return None
        return value <= self.most if self.most is not None else value >= (self.least or 0)


def find(op: str, case: Any) -> Goal | None:
    """The goal of a case, None for a case without one."""
    return GOALS.get(op, {}).get(case.name)


def judge(goal: Goal | None, row: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The goal and whether it is reached, as fields of a row; judged on the cards only."""
    if goal is None or row["implementation"] != JUDGED:
        return {"goal": None, "reached": None}
    return {"goal": str(goal), "reached": goal.reached(row) if CARDS.search(device) else None}


def _bandwidth(share: float, *names: str) -> dict[str, Goal]:
    return {name: Goal("share_of_bandwidth", least=share) for name in names}


_LIKE_64X4096 = (
    *("page16", "page128", "group1", "group8", "group16", "dim64", "dim256"),
    *("int8", "float8_e4m3fn", "tokens2", "tokens4", "tokens8"),
)
_CAUSAL = ("1x1024", "1x2048", "1x4096", "1x8192", "1x16384", "4x4096")
GOALS: dict[str, dict[str, Goal]] = {
    "paged_attention": {
        **{f"decode_1x1024{codes}": Goal("microseconds", most=8.0) for codes in ("", "_int8", "_float8_e4m3fn")},
        **_bandwidth(0.80, "decode_16x1024"),
        **_bandwidth(0.90, "decode_64x1024", "decode_16x4096", "decode_1x65536", "decode_1x131072"),
        **_bandwidth(0.94, "decode_64x4096", "decode_256x1024", *(f"decode_64x4096_{which}" for which in _LIKE_64X4096)),
        **{f"prefill_{size}": Goal("times_contiguous", least=0.92) for size in ("1x2048", "1x8192", "8x4096", "8x4096_int8")},
    },
    "flash_attention": {
        **{f"causal_{size}_dim{head_dim}": Goal("times_peer", least=1.0) for size in _CAUSAL for head_dim in (64, 128, 256)},
        **{name: Goal("times_peer", least=1.0) for name in ("full_1x4096_dim128", "window1024_1x8192_dim128")},
    },
}
