"""R6 holds on the tiny engine, and sees shared salts and digests that are believed."""

import random

from jaxinfer.selftest import r6
from jaxinfer.selftest.mutations import planted
from jaxinfer.selftest.stand import Schedule


def test_it_holds(tested):
    verdict = r6.check(tested, 60, 0)
    assert verdict.passed, verdict.counts
    assert verdict.counts["requests"] == 60 and verdict.counts["collisions"]["reused"] > 0
    assert verdict.counts["salts"]["rounds"] == 20


def test_shared_salts_are_seen(tested):
    with planted("salt_ignored"):
        assert r6.salts(tested, random.Random(0), 3)["wrong"] == 3


def test_a_digest_that_is_believed_is_seen(tested):
    trace = r6.Trace(random.Random(0), tested, 60)
    tested.arrange(Schedule(cache=False, pages=r6.PAGES))
    expected = tested.feed(trace.begin(), follow=trace.follow)
    with planted("parent_not_compared"), planted("tokens_not_compared"):
        found, _ = r6._replay(tested, trace.requests, Schedule(pages=r6.PAGES, digest=r6.few_bits))
    assert r6.judge_of(tested).compare(trace.requests, expected, found).faults
