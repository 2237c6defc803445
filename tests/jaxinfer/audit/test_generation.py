"""Greedy outputs and timed turns through the engine."""

from dataclasses import replace

import pytest

from jaxinfer import prompts
from jaxinfer.api import LLM
from jaxinfer.audit import generation
from jaxinfer.request import FinishReason
from tests.fakes import FakeEngine


@pytest.fixture
def documents(lines):
    engine = FakeEngine()
    return engine, prompts.encode(prompts.read(lines), engine.tokenizer, 256)


def test_outputs_are_greedy_and_end_by_themselves(documents):
    engine, prompts = documents
    found = generation.greedy(LLM.over(engine), prompts, max_tokens=100)
    assert [made.text for made in found][::2] == ["Once upon a", "two"]  # this engine answers with the prompt
    assert all(request.params.greedy and not request.params.stop.ignore_eos for request in engine.seen)


def test_outputs_keep_to_the_room_there_is(documents):
    engine, prompts = documents
    found = generation.greedy(LLM.over(engine), [replace(prompts[0], room=3)], max_tokens=100)
    assert len(found[0].token_ids) == 3


def test_turns_are_taken_in_turn_and_share_no_cache(documents, monkeypatch):
    engine, prompts = documents
    other, order = FakeEngine(), []
    monkeypatch.setattr(generation, "_rate", lambda llm, *rest: order.append(llm.engine) or (2.0 if llm.engine is engine else 3.0))
    speed = generation.race(LLM.over(engine), LLM.over(other), prompts, 4, repeat=2)
    assert order == [engine, other] * 3 and (speed.reference, speed.scheme, speed.ratio, speed.turns) == (2.0, 3.0, 1.5, (1.5, 1.5))
    assert generation.race(LLM.over(engine), LLM.over(other), prompts, 4, repeat=0) is None
    first, second = (generation._requests(prompts, 4, ignore_eos=True) for _ in range(2))
    assert len({request.cache_salt for request in first}) == 1 and first[0].cache_salt != second[0].cache_salt
    assert first[0].params.stop.ignore_eos


def test_a_broken_sequence_is_an_error_that_names_its_line(documents, monkeypatch):
    engine, prompts = documents
    llm = LLM.over(engine)
    made = list(llm.complete(generation._requests(prompts, 4, ignore_eos=False)))
    monkeypatch.setattr(llm, "complete", lambda _: [replace(one, finish_reason=FinishReason.ERROR, error="bad") for one in made])
    with pytest.raises(RuntimeError, match="line 1: bad"):
        generation.greedy(llm, prompts, 4)
