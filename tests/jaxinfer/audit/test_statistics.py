"""Figures and intervals against cases whose answer is known."""

import math

import numpy as np
import pytest

from jaxinfer.audit import statistics
from jaxinfer.audit.statistics import Estimate, Trace


def trace(divergence, first=3, reference=None, other=None, changed=()):
    count = len(divergence)
    own = np.zeros(count, np.float32) if reference is None else np.asarray(reference, np.float32)
    theirs = own if other is None else np.asarray(other, np.float32)
    top = np.arange(3 * count, dtype=np.int32).reshape(count, 3)
    other_top = top.copy()
    other_top[list(changed)] += 1
    logprobs = np.zeros((count, 3), np.float32)
    return Trace(first, np.asarray(divergence, np.float32), own, theirs, top, logprobs, other_top, logprobs)


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    drawn = np.random.default_rng(1).normal(5, 2, 400)
    values = drawn.tolist()
    found = statistics.mean_of(values, [1] * 400, seed=0)
    error = drawn.std() / math.sqrt(400)
    assert found.value == pytest.approx(drawn.mean())
    assert found.low == pytest.approx(drawn.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(drawn.mean() + 1.96 * error, abs=0.1 * error)
    assert found == statistics.mean_of(values, [1] * 400, seed=0) != statistics.mean_of(values, [1] * 400, seed=1)


def test_it_covers_the_truth_nineteen_times_in_twenty():
    random, hits = np.random.default_rng(2), 0
    for seed in range(100):
        found = statistics.mean_of(random.exponential(1, 60).tolist(), [1] * 60, seed)
        hits += found.low <= 1 <= found.high
    assert 88 <= hits <= 99


def test_documents_are_resampled_whole_and_weigh_by_their_tokens():
    two = statistics.mean_of([0.0, 10.0], [10, 10], seed=0)
    assert two == Estimate(0.5, 0.0, 1.0)  # both twice, or one of each
    assert statistics.mean_of([3.0, 1.0, 0.0], [1, 3, 0], seed=0).value == 1.0
    assert statistics.mean_of([3.0, 9.0], [1, 0], seed=0) == Estimate(3.0)
    assert math.isnan(statistics.mean_of([0.0], [0], seed=0).value)


def test_perplexity():
    halves = [np.full(4, math.log(0.5)), np.full(2, math.log(0.5))]
    assert statistics.perplexity(halves, seed=0).value == pytest.approx(2.0)
    uneven = statistics.perplexity([np.full(3, math.log(0.5)), np.full(1, math.log(0.125))], seed=0)
    assert uneven.value == pytest.approx(2**1.5) and uneven.low == pytest.approx(2.0) and uneven.high == pytest.approx(8.0)
    traces = [trace([0.0] * 2, reference=[-1, -1], other=[-1.5, -1]), trace([0.0] * 2, reference=[-3, -1], other=[-3, -1.5])]
    assert statistics.perplexity_ratio(traces, seed=0).value == pytest.approx(math.exp(0.25))
    assert statistics.perplexity([np.full(1, -1000.0)], seed=0).value == math.inf


def test_divergence():
    found = statistics.divergence([trace(np.full(99, 0.01)), trace([1.0, math.nan, math.inf])], seed=0)
    assert found.mean.value == pytest.approx(0.0199) and found.median == pytest.approx(0.01) and found.largest == 1.0
    assert (found.tokens, found.not_finite, sum(found.histogram)) == (102, 2, 100)
    edges = statistics.bin_edges()
    assert len(found.histogram) == len(edges) - 1 and edges[0] == 1e-8 and edges[-1] == pytest.approx(100)
    at = int(np.argmax(found.histogram))
    assert edges[at] <= 0.01001 and edges[at + 1] >= 0.00999
    assert found.p99 == pytest.approx(np.quantile([0.01] * 99 + [1.0], 0.99), rel=1e-5)
    nothing = statistics.divergence([trace([math.nan])], seed=0)
    assert math.isnan(nothing.mean.value) and math.isnan(nothing.p99) and nothing.not_finite == 1 and nothing.places == ()


def test_outliers_count_in_the_outermost_bins():
    found = statistics.divergence([trace([0.0, 1e-12, 1e6])], seed=0)
    assert (found.histogram[0], found.histogram[-1]) == (2, 1)


def test_places_tell_where_in_the_text():
    places = statistics.divergence([trace([1.0, 2.0], first=5), trace([4.0] * 30, first=6)], seed=0).places
    assert (places[0].low, places[-1].high) == (5, 36) and sum(place.tokens for place in places) == 32
    assert all(place.low < place.high for place in places) and len(places) <= statistics.PLACES
    assert places[0].mean == pytest.approx((1 + 2 + 4) / 3 if places[0].high == 7 else 1.0)
    assert places[-1].mean == 4.0


def test_flips_and_agreement():
    assert statistics.flips([trace([0.0] * 3, changed=[1]), trace([0.0])]) == 0.25
    found = statistics.agreement([(1, 2, 3, 4), (5, 6), (7, 8)], [(1, 2, 9, 4), (5, 6), (7, 8, 9)])
    assert found == (2.0, 8 / 3, 1 / 3)
