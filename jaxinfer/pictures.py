"""Plots as inline SVG, by a little code of our own: no script, no font, no library; colours come from the style of the page (page.css).

Marks carry a `<title>`, which browsers show on hover. Classes `s0` .. `s7` are colours; text is never coloured, so names stand beside the
marks. What is drawn is for others to say (audits, distillation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = Path(__file__).with_name("page.css")
COLOURS = 8
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic axis from values low .. high to pixels start .. end; values outside land on its ends."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value lies."""
        low, high, at = (math.log10(x) for x in (self.low, self.high, max(value, 1e-300))) if self.log else (self.low, self.high, value)
        share = min(max((at - low) / (high - low), 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Values worth a line, and how they are written: decades, or about five steps of 1, 2 or 5."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [(10.0**power, power_of_ten(power)) for power in range(first, last + 1)]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        count = math.floor(self.high / step + 1e-9) - math.ceil(self.low / step - 1e-9)
        return [(value := (math.ceil(self.low / step - 1e-9) + at) * step, f"{value:g}") for at in range(count + 1)]


def power_of_ten(power: int) -> str:
    """0.01 as it is, smaller ones as powers."""
    return f"{10.0**power:g}" if -3 <= power <= 3 else f"10{str(power).translate(SUPERSCRIPT)}"


def decades(values: Sequence[float]) -> tuple[float, float]:
    """Whole decades around values, one at least."""
    low = math.floor(math.log10(min(values)) + 1e-9)
    return 10.0**low, 10.0 ** max(math.ceil(math.log10(max(values)) - 1e-9), low + 1)


def colour(row: int) -> str:
    """The class of a scheme's colour."""
    return f"s{row % COLOURS}"


def svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    """One picture, as wide as there is room for it."""
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def grid(x: Scale, top: float, bottom: float, label: str) -> list[str]:
    """Lines and numbers of a horizontal axis, and what it is."""
    parts = []
    for value, text in x.ticks():
        at = x(value)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{at}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    return [*parts, f'<text class="label" x="{(x.start + x.end) / 2}" y="{bottom + 38}" text-anchor="middle">{escape(label)}</text>']


def levels(y: Scale, x: Scale) -> list[str]:
    """Lines and numbers of a vertical axis."""
    parts = []
    for value, text in y.ticks():
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(f'<text class="tick" x="{x.start - 8}" y="{y(value) + 4}" text-anchor="end">{text}</text>')
    return parts


def bar(x: float, y: float, width: float, height: float, style: str, hint: str) -> str:
    """A bar with a hint."""
    box = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" rx="2"'
    return f'<rect class="{style}" {box}><title>{escape(hint)}</title></rect>'


def dot(x: float, y: float, style: str, hint: str, *, radius: float) -> str:
    """A dot with a hint, ringed by the page's surface so that overlapping ones stay apart."""
    return f'<circle class="dot {style}" cx="{x}" cy="{y}" r="{radius}"><title>{escape(hint)}</title></circle>'
