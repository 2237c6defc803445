"""The audit as one self-contained HTML page: verdict, plots, worst contexts, all figures, how they were made. Light and dark.

No script, nothing is fetched; the style is `page.css`. Everything that came from the user or a model is escaped. This file
computes nothing that the report does not hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from jaxinfer.audit import plots
from jaxinfer.audit.plots import Point
from jaxinfer.audit.report import Likely, Report, Scheme, Worst, interval, number, percent, rows
from jaxinfer.pictures import STYLE, colour

SHOWN_STAMP = ("device", "host", "host_busy", "jax", "jaxinfer", "commit", "date", "command")


def render(report: Report) -> str:
    """The whole page."""
    title = f"Quantisation audit of {report.model}"
    sections = [
        _section("How far single tokens move", _distribution_note(), _legendless(plots.histograms(report.schemes, report.max_kl))),
        _section("Along the text", "Mean divergence by position; a rise says that errors add up.", _lines(report)),
        _section("What it buys", "Lower is closer to the unquantised model; left is smaller, right is faster.", _scatters(report)),
        _section("Where they differ most", "The text before a token, the token, and what each model thought likely.", _worst(report)),
        _section("All figures", "", _table(rows(report))),
        _section("How this was made", "", _method(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{STYLE.read_text(encoding='utf-8')}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{_summary(report)}</p></header>{_verdict(report)}{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, note: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{f'<p>{escape(note)}</p>' if note else ''}{body}</section>" if body else ""


def _summary(report: Report) -> str:
    data, device = report.data, report.stamp.get("device", "an unknown device")
    return escape(f"{data.tokens:,} tokens of {data.documents} documents in {data.file}, {report.dtype} on {device}")


def _verdict(report: Report) -> str:
    """One card for each scheme, after one sentence for all."""
    state = "good" if report.within else "bad"
    cards = "".join(_card(row, scheme, report) for row, scheme in enumerate(report.schemes))
    return f'<p class="verdict {state}">{_mark(report.within)} {escape(_capital(report.verdict()))}.</p><div class="cards">{cards}</div>'


def _card(row: int, scheme: Scheme, report: Report) -> str:
    mean = scheme.divergence.mean
    between = "" if mean.low is None or mean.high is None else f"{number(mean.low)} to {number(mean.high)}"
    broken = f"{scheme.divergence.not_finite:,} tokens are not finite" if scheme.divergence.not_finite else ""
    own = report.reference.sizes
    facts = {
        "weights": percent(scheme.sizes.weights / own.weights, 0),
        "KV cache": percent(scheme.sizes.kv_per_token / own.kv_per_token, 0),
        **({} if scheme.speed is None else {"tokens/s": f"{scheme.speed.ratio:.2f}x"}),
        "top token changed": percent(scheme.flips),
    }
    said = "within budget" if scheme.within else "over budget"
    items = "".join(f"<li>{escape(name)}<b>{escape(fact)}</b></li>" for name, fact in facts.items())
    return (
        f'<article class="card"><h3><i class="key {colour(row)}"></i>{escape(scheme.name)}</h3>'
        f'<p class="state {"good" if scheme.within else "bad"}">{_mark(scheme.within)} {said}</p>'
        f'<p class="figure">{escape(number(mean.value))}</p><p class="unit">mean KL, nats per token</p>'
        f'<p class="unit">{escape(broken or between)}</p><ul>{items}</ul></article>'
    )


def _distribution_note() -> str:
    return "Every scored token by its divergence, on a logarithmic axis. The budget bounds the mean, not single tokens."


def _legendless(picture: str) -> str:
    return f'<div class="wide">{picture}</div>'


def _lines(report: Report) -> str:
    keys = "".join(
        f'<li><i class="key {colour(row)}"></i>{escape(scheme.name)}</li>' for row, scheme in enumerate(report.schemes)
    )  # fmt: skip
    picture = plots.along(report.schemes, report.max_kl)
    return f'<ul class="legend">{keys}</ul><div class="wide">{picture}</div>' if picture else ""


def _scatters(report: Report) -> str:
    whole, budget = report.reference.sizes.whole, report.max_kl

    def points(values: Sequence[float | None], what: str) -> list[Point]:
        found = []
        for scheme, value in zip(report.schemes, values, strict=True):
            mean = scheme.divergence.mean.value
            if value is not None:
                found.append(Point(scheme.name, value, mean, f"{scheme.name}: {value:.2f} {what}, mean KL {number(mean)}"))
        return found

    memory = points([scheme.sizes.whole / whole for scheme in report.schemes], "of the memory")
    speed = points([None if scheme.speed is None else scheme.speed.ratio for scheme in report.schemes], "times the speed")
    label = f"memory: weights and {report.reference.sizes.context:,} tokens of KV, relative"
    pictures = [plots.scatter(memory, budget, label=label, one="unquantised")]
    if len(speed) == len(memory):
        pictures.append(plots.scatter(speed, budget, label="tokens per second, relative", one="unquantised"))
    note = '<p class="axis-note">Vertical axis: mean KL, nats per token.</p>'
    return f'{note}<div class="pair">{"".join(f"<div>{picture}</div>" for picture in pictures)}</div>'


def _worst(report: Report) -> str:
    parts = []
    for row, scheme in enumerate(report.schemes):
        name = f"{escape(scheme.name)}, largest {number(scheme.divergence.largest)}"
        heading = f'<summary><i class="key {colour(row)}"></i>{name}</summary>'
        items = "".join(_context(item, scheme.name) for item in scheme.worst)
        parts.append(f"<details{' open' if row == 0 else ''}>{heading}{items}</details>")
    return "".join(parts)


def _context(item: Worst, name: str) -> str:
    return (
        f'<article class="context"><h4>KL {number(item.divergence)} at token {item.position} of line {item.line}</h4>'
        f'<blockquote>{escape(item.context)}<mark>{escape(item.token) or "&nbsp;"}</mark></blockquote>'
        f'<div class="pair">{_likely("unquantised", item.reference)}{_likely(name, item.other)}</div></article>'
    )


def _likely(name: str, tokens: Sequence[Likely]) -> str:
    lines = "".join(
        f"<tr><td><code>{_visible(text)}</code></td><td>{percent(probability)}</td>"
        f'<td><i class="share" style="width:{probability:.1%}"></i></td></tr>'
        for text, probability in tokens
    )
    return f'<table class="likely"><caption>{escape(name)}</caption>{lines}</table>'


def _visible(text: str) -> str:
    """A token with its spaces and line breaks to be seen."""
    return escape(text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "(nothing)")


def _table(lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in lines[0])
    body = "".join(f"<tr><th>{escape(line[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in line[1:])}</tr>" for line in lines[1:])
    return f'<div class="scroll"><table class="figures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _method(report: Report) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes())
    perplexity = f"<li>Perplexity of the unquantised model on these tokens: {escape(interval(report.reference.perplexity))}.</li>"
    about = {"data": f"{report.data.file}, SHA-256 {report.data.sha256}", **{name: report.stamp.get(name) for name in SHOWN_STAMP}}
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in about.items() if value is not None)
    return f"<ul>{notes}{perplexity}</ul><dl>{lines}</dl>"


def _mark(good: bool) -> str:
    return "✓" if good else "✕"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
