"""R2 counts steps and planted bugs, and fails when a bug is there or one is missed."""

import argparse

import pytest

from jaxinfer.selftest import r2
from jaxinfer.selftest.mutations import planted


@pytest.fixture
def two_bugs(monkeypatch):
    monkeypatch.setattr(r2, "MUTATIONS", ["leak_on_abort", "stale_hash"])


def run(steps=3000):
    parser = argparse.ArgumentParser()
    r2.add_arguments(parser)
    return r2.run(argparse.Namespace(**vars(parser.parse_args(["--steps", str(steps)])), quick=True, seed=1))


def test_it_holds(two_bugs):
    verdict = run()
    assert verdict.passed
    assert (verdict.counts["steps"], verdict.counts["planted"], verdict.counts["caught"]) == (3000, 2, 2)
    assert verdict.counts["happened"]["rows"] > 3000


def test_a_bug_is_found_and_can_be_played_again(monkeypatch):
    monkeypatch.setattr(r2, "MUTATIONS", [])
    with planted("owner_not_counted"):
        verdict = run()
    assert not verdict.passed
    assert verdict.counts["faults"] and verdict.counts["first_faults"][0].startswith("play(")


def test_a_missed_bug_is_named(monkeypatch, two_bugs):
    monkeypatch.setattr(r2, "TRIALS", 0)
    verdict = run(10)
    assert not verdict.passed and verdict.counts["missed"] == ["leak_on_abort", "stale_hash"]
