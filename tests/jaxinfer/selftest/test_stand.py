"""One engine behind any schedule: what was asked for happens, and the answers are put together."""

import argparse

import pytest

from jaxinfer.config import EngineConfig
from jaxinfer.request import FinishReason, Request, SamplingParams
from jaxinfer.selftest import stand
from jaxinfer.selftest.stand import Schedule

REQUESTS = [Request(f"{i}", tuple(range(i, i + 12)), SamplingParams(temperature=0, max_tokens=6, logprobs=1)) for i in range(6)]


def parse(*arguments):
    parser = argparse.ArgumentParser()
    stand.add_arguments(parser)
    return vars(parser.parse_args(arguments))


def test_settings_are_those_of_the_tiny_model_unless_one_is_named():
    config = stand.settings(parse("--page-size", "8", "--deterministic"))
    assert (config.model.model, config.model.load_format, config.cache.page_size) == ("tiny", "random", 8)
    assert config.execution.deterministic == "on"
    assert stand.settings(parse("--model", "demo", "--dtype", "bfloat16")).scheduler == EngineConfig().scheduler


def test_flags_give_the_settings_back():
    config = stand.settings(parse("--mesh", "tensor=2", "--max-model-len", "64", "--overlap", "off"))
    assert stand.settings(parse(*stand.flags(config))) == config


def test_schedules_do_what_they_say(tested):
    alone = tested.run(REQUESTS, Schedule(alone=True, cache=False))
    assert all(len(answer.tokens) == len(answer.scores) == 6 and answer.reason == FinishReason.LENGTH for answer in alone.values())
    depth = tested.engine._depth
    for schedule in (Schedule(chunk=5), Schedule(overlap=False), Schedule(pages=12), Schedule(leavers=3)):
        assert {key: answer.tokens for key, answer in tested.run(REQUESTS, schedule).items()} == {k: a.tokens for k, a in alone.items()}
        scheduler = tested.engine.scheduler
        assert scheduler.limits.prefill_tokens == (schedule.chunk or 32) and scheduler.pools[0].size == (schedule.pages or tested.pages)
        assert tested.engine._depth == (0 if schedule.overlap is False else depth)
    tested.run(REQUESTS, Schedule(rounds=2))
    assert tested.engine.scheduler.reused == 6 * 8
    tested.run(REQUESTS, Schedule(rounds=2, cache=False))
    assert tested.engine.scheduler.reused == 0


def test_requests_may_follow_from_answers(tested):
    def follow(request, answer):
        return [Request("next", tuple(answer.tokens), request.params)] if request.id == "0" else []

    answers = tested.feed(REQUESTS[:2], follow=follow, window=1)
    assert set(answers) == {("0", 0), ("1", 0), ("next", 0)}


def test_what_stays_owned_is_an_error(tested, monkeypatch):
    scheduler = tested.arrange(Schedule(cache=False))
    monkeypatch.setattr(type(scheduler), "usage", 0.5)
    with pytest.raises(RuntimeError, match="owned or missing"):
        tested.feed(REQUESTS[:1])
