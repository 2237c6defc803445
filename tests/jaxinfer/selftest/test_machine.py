"""The scheduler under a state machine: arbitrary traffic found by hypothesis, and a large volume of it drawn from seeds."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from jaxinfer.engine import policies
from jaxinfer.engine.sequence import Limits
from jaxinfer.selftest.device import VOCABULARY
from jaxinfer.selftest.machine import LIVES, Arrival, Machine, Setting, play

LIMITS = st.builds(Limits, st.sampled_from((2, 4, 6)), st.sampled_from((3, 16, 30)), st.sampled_from((1, 2, 4)))
SETTINGS = st.builds(
    Setting, pages=st.sampled_from((12, 16, 40, 64)), policy=st.sampled_from(policies.names()), overlap=st.integers(0, 1),
    digest_bits=st.sampled_from((0, 2, 256)), limits=LIMITS,
)  # fmt: skip
ARRIVALS = st.builds(
    Arrival, text=st.integers(0, 5), prefix=st.integers(0, 30), tail=st.tuples() | st.tuples(st.integers(0, VOCABULARY - 1)),
    choices=st.integers(1, 3), limit=st.integers(1, 30), priority=st.integers(-1, 1), salt=st.sampled_from(("", "a")),
)  # fmt: skip


class Traffic(RuleBasedStateMachine):
    """Users, engine and device around the real scheduler."""

    @initialize(setting=SETTINGS)
    def begin(self, setting):
        self.machine = Machine(setting)

    @rule(arrival=ARRIVALS)
    def arrive(self, arrival):
        if len(self.machine.lives) < LIVES:
            self.machine.arrive(arrival)

    @rule(number=st.integers(0, LIVES))
    def abort(self, number):
        self.machine.abort(number)

    @rule(number=st.integers(0, LIVES))
    def leave(self, number):
        self.machine.leave(number)

    @rule(number=st.integers(0, LIVES))
    def poison(self, number):
        self.machine.poison(number)

    @rule(steps=st.integers(1, 8))
    def step(self, steps):
        for _ in range(steps):
            self.machine.step()

    @invariant()
    def accounts_are_right(self):
        if hasattr(self, "machine"):
            self.machine.scheduler.check()

    def teardown(self):
        if hasattr(self, "machine"):
            self.machine.drain()


Traffic.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)  # fmt: skip
TestTraffic = Traffic.TestCase


def volume(seeds):
    counts = sum((play(seed, 1000) for seed in seeds), Counter())
    assert counts["preemptions"] > 100 and counts["copies"] > 500 and counts["poisoned"] > 50 and counts["reused"] > 10_000
    return counts


@pytest.mark.parametrize("part", [0, 1, *(pytest.param(part, marks=pytest.mark.ci) for part in range(2, 8))])
def test_random_traffic(part):
    volume(range(25 * part, 25 * part + 25))


@pytest.mark.parametrize("policy", policies.names())
@pytest.mark.parametrize("overlap", [0, 1])
def test_every_policy_with_and_without_overlap(policy, overlap):
    for bits in (0, 3, 256):
        counts = play(7, 500, Setting(pages=16, policy=policy, overlap=overlap, digest_bits=bits))
        assert counts["done"] > 20


@pytest.mark.parametrize("seed", [688188757, 3197665903])
def test_a_sibling_of_one_whose_digests_collided_and_that_fell_ill(seed):
    """Traffic in which this once made a wiped page known."""
    assert play(seed, 2000)["poisoned"] > 5


def test_traffic_is_a_function_of_its_seed():
    assert play(3, 400) == play(3, 400) != play(4, 400)
