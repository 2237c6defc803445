"""What to do next, and what would make a plan fit."""

import pytest

from jaxinfer.planner.advice import changes, next_steps, remedies
from jaxinfer.planner.estimate import estimate
from tests.jaxinfer.planner.test_estimate import KERNELS, choice


@pytest.fixture(scope="module")
def too_large():
    now = estimate(choice("v5e-1", (1, 1), concurrency=8, context=4096), KERNELS, programs=1 << 30)
    return now, list(changes(now, KERNELS))


def test_what_would_make_it_fit(too_large):
    now, found = too_large
    assert not now.fits
    fitting = remedies(now, found)
    assert "int8 weights" in [change.words for change in fitting] and fitting[-1].words == "slice v5e-4"
    assert all(change.made.fits for change in fitting)
    assert "fits, room for " in fitting[0].effect(now) and "sequences of full length" in fitting[0].effect(now)


def test_changes_that_do_not_help_say_so(too_large):
    now, found = too_large
    shorter = next(change for change in found if change.words == "contexts of 2048 tokens")
    assert shorter.less and shorter.effect(now) == "does not fit"


def test_the_next_best_step_gives_nothing_up():
    now = estimate(choice("h200x1", (1, 1), concurrency=None, goal="latency"), KERNELS, programs=1 << 30)
    found = list(changes(now, KERNELS))
    steps = next_steps(now, found)
    assert steps and not any(change.less for change in steps)
    assert any("XLA_PYTHON_CLIENT_MEM_FRACTION" in change.flags for change in found)
    int8 = next(change for change in found if change.words == "int8 weights")
    assert "audit quant --model MODEL --data FILE --schemes int8" in int8.remark and "x the concurrency" in int8.effect(now)


def test_what_was_taken_already_is_not_proposed():
    now = estimate(choice(quantize="int8", memory_fraction=0.95), KERNELS)
    words = [change.words for change in changes(now, KERNELS)]
    assert "int8 weights" not in words and not any("memory" in each for each in words)
    assert "int4 weights" in words
