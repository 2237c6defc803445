"""Finished requests are run again without drafts when there is nothing else to do, and differences are counted."""

import asyncio
import logging
from dataclasses import replace

import pytest

from jaxinfer.grammar import Grammar
from jaxinfer.request import Request, SamplingParams
from jaxinfer.serve.shadow import ATTEMPTS, LONGEST, WAITING, WATCHED, Shadow
from tests.fakes import FakeEngine, until
from tests.jaxinfer.serve.test_loop import drive, read


class Drafting(FakeEngine):
    """Has drafts; without them it answers with the prompt backwards if `wrong`."""

    wrong = False

    def __post_init__(self):
        super().__post_init__()
        self.speculator = self.drafts = object()

    def add(self, request, *, counted=True):
        assert counted == (self.speculator is not None)
        super().add(replace(request, prompt=request.prompt[::-1]) if self.wrong and not counted else request, counted=counted)


def request(text="hello", name="r", **params):
    return Request(name, tuple(FakeEngine().tokenizer.encode(text)), SamplingParams.of(**{"temperature": 0.0, **params}))


def run(engine, shadow, *requests):
    """Run requests to their ends; what others see of it."""
    for each in requests:
        engine.add(each)
        shadow.watch(each)
    return finish(engine, shadow)


def finish(engine, shadow):
    seen = []
    while engine.has_work:
        seen += shadow.take(engine, engine.step())
    return seen


@pytest.mark.parametrize("wrong", [False, True])
def test_a_mismatch_is_counted_and_told_once_without_the_text(wrong, caplog):
    engine, shadow = Drafting(), Shadow(1.0)
    engine.wrong = wrong
    run(engine, shadow, request("secret", "a"), request("other", "b", max_tokens=3))
    with caplog.at_level(logging.WARNING):
        for number in (1, 2):
            assert shadow.begin(engine) and engine.speculator is None
            assert finish(engine, shadow) == []
            assert engine.speculator is engine.drafts
            assert engine.metrics.shadow["checks"] == number
    assert not shadow.begin(engine)
    assert engine.metrics.shadow["mismatches"] == (2 if wrong else 0)
    assert len(caplog.records) == wrong
    assert "secret" not in caplog.text and "selftest R5" in (caplog.text if wrong else "selftest R5")


def test_only_a_share_of_greedy_requests_that_ended_well():
    engine, shadow = Drafting(), Shadow(1.0)
    sampled, told = request(name="s", temperature=0.5), request(name="g", grammar=Grammar.regex("a*"))
    run(engine, shadow, sampled, told, request("ERROR now", "e"))
    assert not shadow.begin(engine)
    shadow.share = 0.0
    run(engine, shadow, request())
    assert not shadow.begin(engine)


def test_little_is_kept():
    engine, shadow = Drafting(queue_limit=99), Shadow(1.0)
    run(engine, shadow, *(request(name=f"r{number}", max_tokens=2) for number in range(WATCHED + 3)))
    assert len(shadow._waiting) == WAITING and not shadow._watched
    shadow.watch(Request("long", (1,) * LONGEST, SamplingParams(temperature=0.0)))
    assert not shadow._watched


def test_a_replay_gives_way_and_begins_anew():
    engine, shadow = Drafting(), Shadow(1.0)
    run(engine, shadow, request("several tokens"))
    assert shadow.begin(engine)
    shadow.take(engine, engine.step())
    shadow.give_way(engine)
    assert engine.speculator is engine.drafts and engine.running == 0
    seen = run(engine, shadow, request("x", "new"))
    assert {output.request_id for output in seen} == {"new"}
    assert shadow.begin(engine) and not shadow.begin(engine)
    finish(engine, shadow)
    assert engine.metrics.shadow == {"checks": 1}


def test_a_replay_that_always_has_to_give_way_is_dropped():
    engine, shadow = Drafting(), Shadow(1.0)
    run(engine, shadow, request("several tokens"))
    finished = engine.metrics.finished.copy()
    for _ in range(ATTEMPTS):
        assert shadow.begin(engine)
        shadow.give_way(engine)
        assert finish(engine, shadow) == []
    assert not shadow.begin(engine) and engine.speculator is engine.drafts
    assert not engine.metrics.shadow and engine.metrics.finished == finished


def test_in_the_loop_a_request_that_arrives_goes_first():
    async def scenario(loop):
        first = await loop.submit([request("a" * 60, "first")])
        await read(first)
        await asyncio.to_thread(until, lambda: engine.speculator is None)
        second = await loop.submit([request("bc", "second")])
        assert engine.speculator is engine.drafts and engine.running <= 1
        outputs = await read(second)
        assert {output.request_id for output in outputs} == {"second"}
        await asyncio.to_thread(until, lambda: engine.metrics.shadow["checks"] == 2)
        assert engine.metrics.shadow["mismatches"] == 0 and loop.open_calls == 2

    engine = Drafting(step_seconds=0.005)
    drive(engine, scenario, shadow=Shadow(1.0))
    assert [name for name in engine.aborted if name.startswith("shadow-")]
