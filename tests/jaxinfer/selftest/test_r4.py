"""R4 holds on the tiny engine, and sees siblings' pages not copied, draws that depend on the slot, schedules that force nothing."""

import random
from dataclasses import replace

import pytest

from jaxinfer.selftest import r4
from jaxinfer.selftest.mutations import planted


@pytest.fixture
def only(monkeypatch):
    """Keep one schedule."""
    every = r4.schedules
    return lambda name: monkeypatch.setattr(r4, "schedules", lambda *args: {name: every(*args)[name]})


def test_it_holds(tested):
    verdict = r4.check(tested, 6, 0)
    assert verdict.passed, verdict.counts
    counts = verdict.counts
    assert (counts["sequences"], counts["differing_tokens"], counts["promised"]) == (8, 0, "near ties")
    assert len(counts["schedules"]) == 12 and counts["schedules"]["preempted"]["preemptions"] > 0


def test_requests_are_of_every_kind(tested):
    requests = r4.variety(random.Random(1), 24, tested)
    assert {request.index for request in requests} == {0, 1, 2} and len(requests) == 32
    assert sum(request.params.greedy for request in requests) > 5
    assert all(len(request.prompt) + request.params.max_tokens <= tested.longest for request in requests)
    assert any(a.prompt[:4] == b.prompt[:4] and a.prompt != b.prompt for a in requests for b in requests)


def test_a_page_that_is_not_copied_is_seen(tested, only):
    only("siblings")
    with planted("copy_forgotten"):
        verdict = r4.check(tested, 6, 0)
    assert not verdict.passed and verdict.counts["faults"]


def test_draws_that_depend_on_the_slot_are_seen(tested, only, monkeypatch):
    only("full batch")
    admit = tested.engine.program.admit
    by_slot = lambda admission, draws: admit(admission, replace(draws, seed=draws.seed + admission.slot))
    monkeypatch.setattr(tested.engine.program, "admit", by_slot)
    verdict = r4.check(tested, 6, 0)
    assert not verdict.passed and verdict.counts["differing_share"] > 0


def test_a_schedule_must_force_what_it_is_for(tested, only, monkeypatch):
    only("preempted")
    monkeypatch.setattr(r4, "scarce", lambda requests, tested: tested.pages)
    verdict = r4.check(tested, 3, 0)
    assert not verdict.passed and not verdict.counts["faults"]
