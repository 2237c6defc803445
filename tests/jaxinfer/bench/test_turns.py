"""Ratios of noisy turns and their intervals."""

import numpy as np
import pytest

from jaxinfer.bench import turns


def noisy(count, seed, factor=1.0):
    """Times of an engine, the mean of two of its runs, and of another that takes so many times as long; hiccups only ever lengthen a run,
    and the machine wanders."""
    random = np.random.default_rng(seed)
    runs = np.exp(random.normal(0, 0.03, (count, 3)).cumsum()).reshape(count, 3) * (1 + random.exponential(0.12, (count, 3)))
    return runs[:, ::2].mean(axis=1).tolist(), (runs[:, 1] * factor).tolist()


def test_the_ratio_is_that_of_total_times():
    found = turns.compare([1.0, 1.0, 4.0], [1.0, 2.0, 1.0])
    assert found.value == 1.5 and found.turns == (1.0, 0.5, 4.0)
    assert found.interval is not None and 0.5 <= found.interval[0] < 1.5 < found.interval[1] <= 4.0
    assert found == turns.compare([1.0, 1.0, 4.0], [1.0, 2.0, 1.0])


def test_cost_in_few_turns_counts():
    ours = [1.0] * 16 + [2.0] * 4
    found = turns.compare([1.0] * 20, ours)
    assert found.value == pytest.approx(20 / 24) and found.at_least(0.97) == "broken"


def test_what_slows_both_sides_down_widens_nothing():
    wandering = np.random.default_rng(0).uniform(1, 3, 20)
    low, high = turns.compare(wandering.tolist(), (wandering / 0.98).tolist()).interval
    assert low == pytest.approx(0.98) == high


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    found = [turns.compare(*noisy(40, seed)) for seed in range(200)]
    inside = [low <= 1 <= high for low, high in (each.interval for each in found)]
    assert 0.8 <= np.mean(inside) <= 0.97
    assert np.mean([each.value for each in found]) == pytest.approx(1, abs=0.007)  # medians of turns: 1.013


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "shown"), (1.03, "not shown"), (1.2, "broken")])
def test_a_verdict_needs_the_whole_interval(factor, verdict):
    assert turns.compare(*noisy(100, 0, factor)).at_least(0.97) == verdict


def test_few_turns_show_nothing():
    assert turns.compare([1.0], [1.0]) == turns.Ratio(1.0, None, (1.0,))
    assert turns.compare([1.0], [1.0]).at_least(0.97) == "not shown"
    same = [1.0] * turns.FEW
    assert turns.compare(same, same).at_least(0.97) == "shown" and turns.compare(same, [2.0] * turns.FEW).at_least(0.97) == "broken"
    assert turns.compare(same[1:], same[1:]).at_least(0.97) == "not shown"
