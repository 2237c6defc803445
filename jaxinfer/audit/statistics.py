"""Figures of a comparison: what the models thought of every token, put together with how far the figures can be trusted.

Tokens of one document hang together, so intervals come from resampling whole documents (the percentile bootstrap: Efron and Tibshirani
1993, chapter 13), with a fixed seed. Perplexity is exp of the mean negative log probability over all scored tokens. Divergences are in
nats. This file works on NumPy arrays and does not know where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 2000
LEVEL = 0.95
AT_ONCE = 1 << 20  # numbers drawn in one go
DECADES = (-8, 2)  # the histogram's range of log10 nats; what lies outside counts in the outermost bins
BINS_PER_DECADE = 4
PLACES = 16  # most bins along the position


@dataclass(frozen=True)
class Trace:
    """One document under both models, at each of its scored tokens.

    first: position of the first scored token. divergence: KL(reference || other) over the whole vocabulary before that token.
    reference, other: log probabilities of the token itself. The `top` arrays hold the likeliest tokens and their log probabilities, most
    likely first.
    """

    first: int
    divergence: Float[np.ndarray, " scored"]
    reference: Float[np.ndarray, " scored"]
    other: Float[np.ndarray, " scored"]
    reference_top: Int[np.ndarray, "scored top"]
    reference_top_logprobs: Float[np.ndarray, "scored top"]
    other_top: Int[np.ndarray, "scored top"]
    other_top_logprobs: Float[np.ndarray, "scored top"]


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval that 95 % of resampled sets of documents give; no interval for a single document."""

    value: float
    low: float | None = None
    high: float | None = None

    def through(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of an increasing function of the figure."""
        low, high = (None if bound is None else function(bound) for bound in (self.low, self.high))
        return Estimate(function(self.value), low, high)


class Place(NamedTuple):
    """Mean divergence of the scored tokens at positions low .. high - 1."""

    low: int
    high: int
    tokens: int
    mean: float


@dataclass(frozen=True)
class Divergence:
    """KL(reference || other) per scored token, in nats. Tokens where it is no finite number are counted and left out of the rest.

    histogram: tokens in each bin of log10 of it, quarter decades from 1e-8 to 100.
    """

    mean: Estimate
    median: float
    p99: float
    largest: float
    tokens: int
    not_finite: int
    histogram: tuple[int, ...]
    places: tuple[Place, ...]


class Agreement(NamedTuple):
    """How long greedy outputs stay the same. Tokens: mean length of the common beginning and of the reference's output; whole: share of
    documents whose outputs are equal to the end."""

    tokens: float
    of: float
    whole: float


def mean_of(sums: Sequence[float], counts: Sequence[int], seed: int) -> Estimate:
    """Sum over documents of `sums` by that of `counts`, documents with a count of 0 left out, with its bootstrap interval."""
    total, number = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    total, number = total[number > 0], number[number > 0]
    if not len(total):
        return Estimate(math.nan)
    value = float(total.sum() / number.sum())
    if len(total) == 1:
        return Estimate(value)
    random, means = np.random.default_rng(seed), []
    block = max(AT_ONCE // len(total), 1)
    for done in range(0, RESAMPLES, block):
        drawn = random.integers(0, len(total), (min(block, RESAMPLES - done), len(total)))
        means.append(total[drawn].sum(axis=1) / number[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimate(value, float(low), float(high))


def perplexity(logprobs: Sequence[np.ndarray], seed: int) -> Estimate:
    """exp of the mean negative log probability of the tokens of all documents."""
    return mean_of([-float(values.sum(dtype=np.float64)) for values in logprobs], [len(values) for values in logprobs], seed).through(_exp)


def perplexity_ratio(traces: Sequence[Trace], seed: int) -> Estimate:
    """The other model's perplexity over the reference's, both on the same resampled documents."""
    return perplexity([trace.other.astype(np.float64) - trace.reference for trace in traces], seed)


def divergence(traces: Sequence[Trace], seed: int) -> Divergence:
    """All figures of the KL divergence."""
    kept = [trace.divergence[np.isfinite(trace.divergence)].astype(np.float64) for trace in traces]
    values, tokens = np.concatenate(kept), sum(len(trace.divergence) for trace in traces)
    mean = mean_of([float(part.sum()) for part in kept], [len(part) for part in kept], seed)
    median, p99, largest = np.quantile(values, (0.5, 0.99, 1.0)).tolist() if len(values) else (math.nan,) * 3
    return Divergence(mean, median, p99, largest, tokens, tokens - len(values), _histogram(values), _places(traces))


def flips(traces: Sequence[Trace]) -> float:
    """Share of scored tokens before which the two models hold different tokens for the likeliest."""
    changed = np.concatenate([trace.reference_top[:, 0] != trace.other_top[:, 0] for trace in traces])
    return float(changed.mean())


def agreement(reference: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> Agreement:
    """How long each greedy output stays the reference's."""
    common = [_common(left, right) for left, right in zip(reference, other, strict=True)]
    equal = [tuple(left) == tuple(right) for left, right in zip(reference, other, strict=True)]
    return Agreement(sum(common) / len(common), sum(map(len, reference)) / len(common), sum(equal) / len(equal))


def bin_edges() -> list[float]:
    """Where the histogram's bins begin and end, in nats."""
    low, high = DECADES
    return [10 ** (low + step / BINS_PER_DECADE) for step in range((high - low) * BINS_PER_DECADE + 1)]


def _histogram(values: Float[np.ndarray, " tokens"]) -> tuple[int, ...]:
    edges = bin_edges()
    inside = np.clip(values, edges[0], math.nextafter(edges[-1], 0))
    return tuple(np.histogram(inside, edges)[0].tolist())


def _places(traces: Sequence[Trace]) -> tuple[Place, ...]:
    at = np.concatenate([trace.first + np.arange(len(trace.divergence)) for trace in traces])
    values = np.concatenate([trace.divergence for trace in traces]).astype(np.float64)
    at, values = at[np.isfinite(values)], values[np.isfinite(values)]
    if not len(at):
        return ()
    low, high = int(at.min()), int(at.max()) + 1
    edges = np.unique(np.linspace(low, high, min(PLACES, high - low) + 1).astype(int))
    which = np.searchsorted(edges, at, side="right") - 1
    members = [values[which == number] for number in range(len(edges) - 1)]
    return tuple(
        Place(int(edges[n]), int(edges[n + 1]), len(part), float(part.mean())) for n, part in enumerate(members) if len(part)
    )  # fmt: skip


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _exp(value: float) -> float:
    """exp, with what no float holds as infinity."""
    return math.exp(value) if value < 709 else math.inf if not math.isnan(value) else math.nan
