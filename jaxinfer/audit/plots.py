"""The plots of the page as inline SVG (`pictures.py`). Colours are the schemes', in the order in which they were asked for.

This file knows the report's figures and no HTML beyond SVG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from jaxinfer.audit.report import Scheme, number
from jaxinfer.audit.statistics import bin_edges
from jaxinfer.pictures import Scale, bar, colour, decades, dot, grid, levels, svg

WIDTH, LEFT, RIGHT = 760, 120, 110  # room for names at the left, for the last figure at the right
ROW, TOP = 76, 34


class Point(NamedTuple):
    """One scheme of a scatter plot: what it costs or gives, its mean divergence, and what to say on hover."""

    name: str
    x: float
    y: float
    hint: str


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


def _labels(points: Sequence[tuple[float, float, str]], width: float) -> list[tuple[tuple[float, float], str]]:
    """Names beside their points: to the left where the right has no room, moved down where two would overlap."""
    placed: list[tuple[tuple[float, float], str]] = []
    for px, py, text in sorted(points, key=lambda point: point[1]):
        length = 7.2 * len(text)
        at = px + 11 if px + 11 + length < width else px - 11 - length
        below = [taken + 15 for (left, taken), other in placed if left < at + length and at < left + 7.2 * len(other)]
        placed.append(((round(at, 2), max([round(py + 4, 2), *below])), text))
    return placed
