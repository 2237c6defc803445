"""Verified draws against plain ones: one context holds, and a verifier that lets a position see too little does not."""

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


def test_penalties_that_do_not_see_the_draft_are_noticed(monkeypatch):
    """The slots of the first position are used for both: a token that was just drawn is not punished."""
    scan = jax.lax.scan

    def forgetful(step, init, places):
        return scan(lambda state, at: ((init[0], step(state, at)[0][1]), step((init[0], state[1]), at)[1]), init, places)

    draws._programs.cache_clear()
    monkeypatch.setattr("jaxinfer.step.verify.jax.lax.scan", forgetful)
    try:
        assert min(value for seed in range(3) for value in draws.compare(seed, 4096)) < 1e-3
    finally:
        draws._programs.cache_clear()
