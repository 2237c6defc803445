"""What an audit found, as data, and its two plain forms: one JSON object and a table for the terminal.

The page (`page.py`) is made from the same `Report`. A figure that is no finite number is null in JSON. This file computes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from jaxinfer.audit.statistics import Agreement, Divergence, Estimate
from jaxinfer.audit.task import Score

MIB = 1 << 20
BUSY = 0.2  # share of the processors that others may use before times mean little
SHOWN = 60  # characters of a context on the terminal


@dataclass(frozen=True)
class Data:
    """What was scored. own: documents without a completion, scored on the reference model's own greedy continuation. cut: tokens of
    completions that the context did not hold."""

    file: str
    sha256: str
    documents: int
    own: int
    tokens: int
    cut: int
    longest: int


class Sizes(NamedTuple):
    """Bytes of all weights, of one token's keys and values in all layers, and tokens of the model's whole context."""

    weights: int
    kv_per_token: int
    context: int

    @property
    def whole(self) -> int:
        """Weights and the KV cache of one sequence that fills the context."""
        return self.weights + self.kv_per_token * self.context


class Likely(NamedTuple):
    """A token that a model thought likely, as text, and its probability."""

    text: str
    probability: float


@dataclass(frozen=True)
class Speed:
    """Output tokens per second, prompts' time included, medians of turns taken in turn; ratio: median of the turns' own ratios."""

    reference: float
    scheme: float
    ratio: float
    turns: tuple[float, ...]


@dataclass(frozen=True)
class Worst:
    """A token at which the models differ most: where it is, the text before it, the token that came, what both thought likely."""

    line: int
    position: int
    divergence: float
    context: str
    token: str
    reference: tuple[Likely, ...]
    other: tuple[Likely, ...]


@dataclass(frozen=True)
class Reference:
    """The unquantised model."""

    perplexity: Estimate
    sizes: Sizes
    task: Score | None


@dataclass(frozen=True)
class Scheme:
    """One scheme beside the unquantised model."""

    name: str
    within: bool
    divergence: Divergence
    flips: float
    perplexity: Estimate
    perplexity_ratio: Estimate
    agreement: Agreement
    sizes: Sizes
    task: Score | None
    speed: Speed | None
    worst: tuple[Worst, ...]


@dataclass(frozen=True)
class Report:
    """Everything. left_out: schemes that were not named and refused to run, with the reason. stamp: device, versions, date, command."""

    model: str
    dtype: str
    max_kl: float
    data: Data
    reference: Reference
    schemes: tuple[Scheme, ...]
    left_out: dict[str, str]
    stamp: dict[str, Any]

    @property
    def within(self) -> bool:
        """Whether every scheme keeps to the budget."""
        return all(scheme.within for scheme in self.schemes)

    def verdict(self) -> str:
        """The outcome in one sentence."""
        over = [scheme.name for scheme in self.schemes if not scheme.within]
        budget = f"a mean KL of {self.max_kl:g} nats per token"
        return f"over {budget}: {', '.join(over)}" if over else f"every scheme is within {budget}"

    def as_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps(..., allow_nan=False)`."""
        return _finite({"audit": "quant", "within": self.within, **asdict(self)})

    def contexts(self) -> list[str]:
        """The token at which each scheme differs most, one line each; JSON and the page have more of them."""
        found = []
        for scheme in self.schemes:
            for it in scheme.worst[:1]:
                where = f"KL {number(it.divergence)} at token {it.position} of line {it.line}"
                likely = " and ".join(f"{top[0].text!r} {percent(top[0].probability)}" for top in (it.reference, it.other))
                found.append(f"worst of {scheme.name}: {where}, {it.context[-SHOWN:]!r} -> {it.token!r}; likeliest were {likely}")
        return found

    def notes(self) -> list[str]:
        """What a reader must know to read the figures rightly, one sentence each."""
        data = self.data
        found = [
            f"{data.tokens:,} tokens of {data.documents} documents were scored; intervals are 95 % bootstrap intervals over documents.",
            "KL is KL(unquantised || scheme) in nats per scored token, over the whole vocabulary, both models reading the same text.",
        ]
        if data.own:
            found.append(
                f"{data.own} of {data.documents} documents have no completion: the unquantised model's own greedy continuation was scored,"
                " which is likelier text than people write, so its perplexity says little."
            )
        if data.cut:
            found.append(f"{data.cut:,} tokens of completions did not fit in the context and were cut off.")
        if any(scheme.speed is not None for scheme in self.schemes) and (self.stamp.get("host_busy") or 0) > BUSY:
            found.append(f"Other programs used {percent(self.stamp['host_busy'], 0)} of the processors: the tokens per second mean little.")
        return found + [f"{name} was left out: {reason}" for name, reason in self.left_out.items()]


def rows(report: Report) -> list[list[str]]:
    """The table: a heading, then one row per figure with a column for the unquantised model and one for each scheme. Figures that
    nobody has are left out."""
    own, task = report.reference.sizes, report.reference.task
    figures: list[tuple[str, str, Callable[[Scheme], str]]] = [
        ("KL, mean (nats/token)", "", lambda it: interval(it.divergence.mean)),
        ("KL, 99 % of tokens below", "", lambda it: number(it.divergence.p99)),
        ("KL, largest", "", lambda it: number(it.divergence.largest)),
        ("top token changed", "", lambda it: percent(it.flips)),
        ("perplexity", interval(report.reference.perplexity), lambda it: interval(it.perplexity)),
        ("perplexity, ratio", "", lambda it: interval(it.perplexity_ratio, 5)),
        ("greedy tokens in common", "", lambda it: f"{it.agreement.tokens:.1f} of {it.agreement.of:.1f}"),
        ("greedy outputs equal", "", lambda it: percent(it.agreement.whole)),
        ("your metric", number(task.value) if task else "", lambda it: number(it.task.value) if it.task else ""),
        ("your metric, documents equal", "", lambda it: percent(it.task.same) if it.task and it.task.same is not None else ""),
        ("weights (MiB)", f"{own.weights / MIB:,.1f}", lambda it: _beside(it.sizes.weights, own.weights)),
        ("KV (bytes/token)", f"{own.kv_per_token:,}", lambda it: f"{it.sizes.kv_per_token:,}"),
        ("tokens/s (its own reference's)", "", lambda it: _speed(it.speed)),
        (f"mean KL within {report.max_kl:g}", "", lambda it: "yes" if it.within else "NO"),
    ]
    found = [[name, plain, *map(cell, report.schemes)] for name, plain, cell in figures]
    return [["", "unquantised", *(scheme.name for scheme in report.schemes)], *(row for row in found if any(row[1:]))]


def number(value: float, digits: int = 3) -> str:
    """A figure for people."""
    return "not finite" if not math.isfinite(value) else f"{value:,.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def interval(estimate: Estimate, digits: int = 3) -> str:
    """A figure and its interval."""
    if estimate.low is None or estimate.high is None:
        return number(estimate.value, digits)
    return f"{number(estimate.value, digits)} [{number(estimate.low, digits)}, {number(estimate.high, digits)}]"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{share:.{digits}%}".replace("%", " %")


def _beside(value: int, reference: int) -> str:
    return f"{value / MIB:,.1f} ({percent(value / reference, 0)})"


def _speed(speed: Speed | None) -> str:
    return "" if speed is None else f"{speed.scheme:,.0f} ({speed.reference:,.0f}), {speed.ratio:.2f}x"


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if hasattr(value, "_asdict"):
        return _finite(value._asdict())
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
