"""Verified draws against plain ones: one context holds, and a verifier whose places are mixed up does not."""

import jax
import numpy as np

from jaxinfer.selftest import draws


def test_a_context_holds():
    assert min(draws.compare(3, 2048)) > 1e-4


def test_a_test_for_one_distribution():
    numbers = np.random.default_rng(0)
    one, other = numbers.integers(0, 20, 4000), numbers.integers(0, 20, 3000)
    assert draws.homogeneity(one, other) > 1e-3
    assert draws.homogeneity(one, np.where(other == 3, 4, other)) < 1e-6
    assert draws.homogeneity(one[:0], other) == 1.0


def test_a_place_that_draws_from_the_logits_before_it_is_noticed(monkeypatch):
    scan = jax.lax.scan

    def late(step, init, places):
        return scan(lambda state, at: step(state, (at[0], places[1][0], *at[2:])), init, places)

    draws._programs.cache_clear()
    monkeypatch.setattr("jaxinfer.step.verify.jax.lax.scan", late)
    try:
        assert min(draws.compare(3, 2048)) < 1e-6
    finally:
        draws._programs.cache_clear()
