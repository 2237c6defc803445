"""R5 holds on the tiny engines, and sees a verifier that keeps what it should not."""

import numpy as np
import pytest

from jaxinfer.selftest import r4, r5
from jaxinfer.selftest.stand import Stand


@pytest.fixture
def both(tested, speculating):
    return tested, Stand(speculating)


@pytest.fixture
def some(monkeypatch):
    """Fewer schedules."""
    every = r4.schedules
    keep = ("full batch", "preempted", "overlap off")
    monkeypatch.setattr(r4, "schedules", lambda *args: {name: every(*args)[name] for name in keep})


def test_it_holds(both, some):
    verdict = r5.check(*both, 6, 0)
    assert verdict.passed, verdict.counts
    assert verdict.counts["differing_tokens"] == 0 < verdict.counts["accepted"] < verdict.counts["drafts"]
    assert verdict.counts["bad_drafts_refused"]
    unseen = [name for name in verdict.counts["schedules"] if name.endswith("drafts unseen")]
    assert unseen == ["full batch, drafts unseen", "preempted, drafts unseen"]


def test_a_rejected_draft_that_is_kept_is_seen(both, some, monkeypatch):
    program = both[1].engine.program
    verify = program.verify

    def generous(computed, demand, mask):
        found = verify(computed, demand, mask)
        object.__setattr__(found, "counts", np.array(computed.rows.lengths))
        return found

    monkeypatch.setattr(program, "verify", generous)
    assert not r5.check(*both, 3, 0).passed


def test_an_engine_without_drafts_is_no_test_of_them(tested):
    with pytest.raises(ValueError, match="one that drafts"):
        r5.check(tested, tested, 1, 0)


def test_many_tests_are_judged_together():
    assert r5.judged([0.002] + [0.5] * 20, 1, 1).passed
    assert not r5.judged([0.002], 1, 1).counts["smallest_p_holm"] > 0.002
    assert not r5.judged([1e-5] + [0.5] * 20, 1, 1).passed


def test_foreign_ids_are_refused(monkeypatch):
    assert r5.refuses(10)
    monkeypatch.setattr("jaxinfer.engine.proposers.proposal.checked", lambda tokens, vocab: tokens)
    assert not r5.refuses(10)
