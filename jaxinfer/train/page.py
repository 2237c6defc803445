"""A distillation as one self-contained HTML page: figures, the loss of every step, how many drafts stand before and after. Light and dark.

No script, nothing is fetched. Everything that came from the user is escaped. This file computes nothing that the figures do not hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from jaxinfer.pictures import STYLE, Scale, bar, colour, grid, levels, svg

WIDTH, LEFT, BOTTOM = 760, 56, 250
POINTS = 240  # of the curve; each the mean of the steps around it
HIDDEN = ("loss", "before", "after")


def render(figures: Mapping[str, Any]) -> str:
    """The whole page."""
    title, data = f"Draft for {figures['target']}, distilled", figures["data"]
    summary = f"{data['learned_tokens']:,} tokens of {data['texts']} texts from {data['file']}; {data['held_out']} texts held out"
    keys = "".join(f'<li><i class="key {colour(at)}"></i>{name}</li>' for at, name in enumerate(("before", "after")))
    sections = [
        _section("Drafts that stand", f'<ul class="legend">{keys}</ul>{"".join(_acceptance(*pair) for pair in _pairs(figures))}'),
        _section("KL to the target, training texts", f'<div class="wide">{loss(figures["loss"])}</div>'),
        _section("How this was made", _table({name: value for name, value in figures.items() if name not in HIDDEN})),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{STYLE.read_text(encoding='utf-8')}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(summary)}</p></header>{''.join(sections)}</main></body></html>\n"
    )


def loss(values: Sequence[float]) -> str:
    """The loss of the steps, nats for each token, as a line."""
    size = -(-len(values) // POINTS)
    means = [sum(part) / len(part) for part in (values[at : at + size] for at in range(0, len(values), size))]
    x, y = Scale(0, len(values), LEFT, WIDTH - 16), Scale(0, max([*means, 1e-6]) * 1.05, BOTTOM, 16)
    dots = " ".join(f"{x((at + 0.5) * size)},{y(value)}" for at, value in enumerate(means))
    line = f'<polyline class="line {colour(0)}" points="{dots}"/>'
    return svg(WIDTH, BOTTOM + 44, [*grid(x, 16, BOTTOM, "step"), *levels(y, x), line], "KL divergence of the training steps")


def bars(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The share of places where so many drafts stand, before and after, for one temperature."""
    count, parts = len(after["stand"]), []
    y, room = Scale(0, 1, BOTTOM, 16), (WIDTH - LEFT - 16) / len(after["stand"])
    parts += levels(y, Scale(0, 1, LEFT, WIDTH - 16))
    for at in range(count):
        for side, found in enumerate((before, after)):
            share, left = found["stand"][at], LEFT + at * room + room * (0.2 + 0.3 * side)
            name = ("before", "after")[side]
            hint = f"{at + 1} draft(s) in a row, {name}: {share:.1%} of {found['places']:,} places"
            parts.append(bar(left, y(share), room * 0.28, BOTTOM - y(share), colour(side), hint))
            text = f'<text class="note" x="{left + room * 0.14:.1f}" y="{y(share) - 5}" text-anchor="middle">{share:.0%}</text>'
            parts.append(text)
        middle = LEFT + (at + 0.5) * room
        parts.append(f'<text class="label" x="{middle:.1f}" y="{BOTTOM + 22}" text-anchor="middle">{at + 1} in a row</text>')
    return svg(WIDTH, BOTTOM + 34, parts, "Share of places where so many drafts stand")


def _pairs(figures: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    return list(zip(figures["before"], figures["after"], strict=True))


def _acceptance(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    warmth = f"temperature {after['temperature']:g}" if after["temperature"] else "greedy"
    said = f"{warmth}: {before['tokens_per_step']:.2f} tokens a step before, {after['tokens_per_step']:.2f} after"
    return f'<p>{escape(said)}</p><div class="wide">{bars(before, after)}</div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _table(values: Mapping[str, Any]) -> str:
    rows = (f"<tr><td>{escape(name)}</td><td><code>{escape(_text(value))}</code></td></tr>" for name, value in values.items())
    return f"<table>{''.join(rows)}</table>"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
