"""The plots of the page as inline SVG, by a little code of our own: no script, no font, no library; colours come from the page's style.

Marks carry a `<title>`, which browsers show on hover. Classes `s0` .. `s7` are the schemes' colours, in the order in which they were
asked for; text is never coloured, so names stand beside the marks. This file knows the report's figures and no HTML beyond SVG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from jaxinfer.audit.report import Scheme, number
from jaxinfer.audit.statistics import bin_edges

COLOURS = 8
WIDTH, LEFT, RIGHT = 760, 120, 110  # room for names at the left, for the last figure at the right
ROW, TOP = 76, 34
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


class Point(NamedTuple):
    """One scheme of a scatter plot: what it costs or gives, its mean divergence, and what to say on hover."""

    name: str
    x: float
    y: float
    hint: str


def power_of_ten(power: int) -> str:
    """0.01 as it is, smaller ones as powers."""
    return f"{10.0**power:g}" if -3 <= power <= 3 else f"10{str(power).translate(SUPERSCRIPT)}"


def histograms(schemes: Sequence[Scheme], budget: float) -> str:
    """Tokens by their divergence, one row for each scheme on one axis; the few below it are in its first bar."""
    edges = bin_edges()
    low, high = decades([*_shown([scheme.divergence.histogram for scheme in schemes]), *([budget] if budget else [])])
    x, bottom = Scale(low, high, LEFT, WIDTH - RIGHT, log=True), TOP + ROW * len(schemes)
    parts = [*grid(x, TOP, bottom, "KL of one token, nats"), *across(x, budget, TOP - 12, bottom)]
    for row, scheme in enumerate(schemes):
        base, counts = TOP + ROW * (row + 1) - 8, _gathered(scheme.divergence.histogram, low)
        parts.append(f'<text class="name" x="{LEFT - 14}" y="{base - 4}" text-anchor="end">{escape(scheme.name)}</text>')
        for at, count in enumerate(counts):
            if count:
                left, right, height = x(edges[at]), x(edges[at + 1]), max((ROW - 30) * count / max(counts), 1.5)
                span = f"from {number(edges[at])} to" if edges[at] > 1.01 * low else "below"
                hint = f"{scheme.name}: {count:,} tokens ({count / sum(counts):.1%}) {span} {number(edges[at + 1])} nats"
                parts.append(bar(left + 1, base - height, max(right - left - 2, 1), height, colour(row), hint))
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        parts += marker(x(scheme.divergence.mean.value), base, f"mean {number(scheme.divergence.mean.value, 2)}", left=True)
        parts += marker(x(scheme.divergence.p99), base, f"99 % below {number(scheme.divergence.p99, 2)}", left=False)
    return svg(WIDTH, bottom + 44, parts, "Histogram of the KL divergence of single tokens for each scheme")


def along(schemes: Sequence[Scheme], budget: float) -> str:
    """Mean divergence by position in the text, one line for each scheme."""
    places = [place for scheme in schemes for place in scheme.divergence.places]
    if not places:
        return ""
    low, high = decades([max(place.mean, 1e-12) for place in places] + ([budget] if budget else []))
    x = Scale(min(place.low for place in places), max(place.high for place in places), LEFT - 60, WIDTH - 16)
    y = Scale(low, high, 290, 16, log=True)
    parts = [*grid(x, 16, 290, "position in the text, tokens"), *levels(y, x), *level(y, budget, x)]
    for row, scheme in enumerate(schemes):
        dots = [(x((place.low + place.high) / 2), y(place.mean), place) for place in scheme.divergence.places]
        parts.append(f'<polyline class="line {colour(row)}" points="{" ".join(f"{px},{py}" for px, py, _ in dots)}"/>')
        for px, py, place in dots:
            hint = f"{scheme.name}, positions {place.low} to {place.high - 1}: {number(place.mean)} nats over {place.tokens:,} tokens"
            parts.append(dot(px, py, colour(row), hint, radius=4))
    return svg(WIDTH, 336, parts, "Mean KL divergence by position in the text")


def scatter(points: Sequence[Point], budget: float, *, label: str, one: str) -> str:
    """Mean divergence against something relative to the unquantised model, which stands at 1 (`one` names it)."""
    width, bottom, shown = 372, 290, [point for point in points if point.y > 0 and math.isfinite(point.y)]
    low, high = decades([point.y for point in shown] + ([budget] if budget else []) or [1e-3])
    x = Scale(0.0, max([1.1, *(point.x * 1.1 for point in points)]), 56, width - 16)
    y = Scale(low, high, bottom, 28, log=True)
    parts = [*grid(x, 28, bottom, label), *levels(y, x), *level(y, budget, x)]
    parts.append(f'<line class="one" x1="{x(1)}" x2="{x(1)}" y1="28" y2="{bottom}"/>')
    parts.append(f'<text class="note" x="{x(1)}" y="20" text-anchor="middle">{escape(one)}</text>')
    for row, point in enumerate(points):
        if point in shown:
            parts.append(dot(x(point.x), y(point.y), colour(row), point.hint, radius=6))
    for (px, py), text in _labels([(x(point.x), y(point.y), point.name) for point in shown], width):
        parts.append(f'<text class="name" x="{px}" y="{py}">{escape(text)}</text>')
    return svg(width, bottom + 46, parts, f"Mean KL divergence against {label}")


def _shown(histograms: Sequence[Sequence[int]]) -> list[float]:
    """The range, in nats, that holds all but each histogram's lowest hundredth."""
    edges, found = bin_edges(), []
    for counts in histograms:
        total, seen = sum(counts), 0
        for at, count in enumerate(counts):
            seen += count
            if count and seen > total / 100:
                found += [edges[at], edges[at + 1]]
    return found or [edges[0], edges[-1]]


def _gathered(counts: Sequence[int], low: float) -> list[int]:
    """The histogram with everything below `low` in the first bin above it."""
    first = next(at for at, edge in enumerate(bin_edges()) if edge > 0.99 * low)
    return [0] * first + [sum(counts[: first + 1])] + list(counts[first + 1 :])


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


def level(y: Scale, budget: float, x: Scale) -> list[str]:
    """The budget as a horizontal line."""
    if not budget:
        return []
    return [
        f'<line class="budget" x1="{x.start}" x2="{x.end}" y1="{y(budget)}" y2="{y(budget)}"/>',
        f'<text class="note" x="{x.start + 6}" y="{y(budget) - 5}">budget {budget:g}</text>',
    ]


def across(x: Scale, budget: float, top: float, bottom: float) -> list[str]:
    """The budget as a vertical line."""
    if not budget:
        return []
    return [
        f'<line class="budget" x1="{x(budget)}" x2="{x(budget)}" y1="{top}" y2="{bottom}"/>',
        f'<text class="note" x="{x(budget)}" y="{top - 6}" text-anchor="middle">budget of the mean {budget:g}</text>',
    ]


def marker(at: float, base: float, text: str, *, left: bool) -> list[str]:
    """A figure above a histogram's bars, to the left of its line or to the right."""
    top = base - ROW + 18
    return [
        f'<line class="mark" x1="{at}" x2="{at}" y1="{top}" y2="{base}"/>',
        f'<text class="note" x="{at + (-5 if left else 5)}" y="{top + 8}" text-anchor="{"end" if left else "start"}">{escape(text)}</text>',
    ]


def bar(x: float, y: float, width: float, height: float, style: str, hint: str) -> str:
    """A bar with a hint."""
    box = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" rx="2"'
    return f'<rect class="{style}" {box}><title>{escape(hint)}</title></rect>'


def dot(x: float, y: float, style: str, hint: str, *, radius: float) -> str:
    """A dot with a hint, ringed by the page's surface so that overlapping ones stay apart."""
    return f'<circle class="dot {style}" cx="{x}" cy="{y}" r="{radius}"><title>{escape(hint)}</title></circle>'


def _labels(points: Sequence[tuple[float, float, str]], width: float) -> list[tuple[tuple[float, float], str]]:
    """Names beside their points: to the left where the right has no room, moved down where two would overlap."""
    placed: list[tuple[tuple[float, float], str]] = []
    for px, py, text in sorted(points, key=lambda point: point[1]):
        length = 7.2 * len(text)
        at = px + 11 if px + 11 + length < width else px - 11 - length
        below = [taken + 15 for (left, taken), other in placed if left < at + length and at < left + 7.2 * len(other)]
        placed.append(((round(at, 2), max([round(py + 4, 2), *below])), text))
    return placed
