"""generate and LLM over an engine that echoes its prompts (see tests/fakes.py)."""

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest

from jaxinfer import api
from jaxinfer.api import LLM, Completion, engine_config
from jaxinfer.config import ConfigError, EngineConfig, MeshShape
from jaxinfer.grammar import Grammar
from jaxinfer.request import FinishReason, QueueFull, RequestError, SamplingParams
from jaxinfer.tokenizer import TokenizerError
from tests.fakes import FakeEngine, FakeInfo


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def llm(engine):
    return LLM.over(engine)


def texts(completions):
    return [completion.text for completion in completions]


def test_one_prompt_gives_one_completion(llm, engine):
    done = llm.generate("hello", max_tokens=3, temperature=0)
    assert done == Completion("hel", tuple(b"hel"[i] - 33 for i in range(3)), FinishReason.LENGTH, (), 5)
    assert engine.seen[0].params == SamplingParams(temperature=0, max_tokens=3)


def test_token_ids_are_a_prompt(llm):
    ids = llm.tokenizer.encode("abc")
    assert llm.generate(ids).text == llm.generate(np.array(ids)).text == llm.generate([ids])[0].text == "abc"


def test_many_prompts_keep_their_order_and_choices(llm):
    done = llm.generate(["long prompt", "b", "cde"], n=2)
    assert texts(done) == ["long prompt", "ong promptl", "b", "b", "cde", "dec"]
    assert [completion.index for completion in done] == [0, 1] * 3
    assert texts(llm.generate("ab", n=2)) == ["ab", "ba"]
    assert llm.generate([]) == []


def test_defaults_are_the_models_and_params_replace_them(llm, engine):
    llm.generate("x")
    llm.generate("x", SamplingParams(top_k=3))
    assert [request.params.temperature for request in engine.seen] == [0.5, 1.0]
    with pytest.raises(RequestError, match="give params or top_k, not both"):
        llm.generate("x", SamplingParams(), top_k=2)
    with pytest.raises(RequestError, match="unknown sampling field 'max_token'"):
        llm.generate("x", max_token=3)


def test_logprobs_come_along(llm):
    done = llm.generate("ab", logprobs=2)
    assert len(done.logprobs) == 3 and len(done.logprobs[0].top) == 2


def test_an_error_in_one_row_is_its_own(llm):
    bad, good = llm.generate(["ERROR here", "fine"])
    assert (bad.finish_reason, bad.error, good.text) == (FinishReason.ERROR, "planted error in this row", "fine")


def test_a_refused_prompt_aborts_the_others(llm, engine):
    with pytest.raises(RequestError, match="does not take this prompt"):
        llm.generate(["fine", "REFUSE", "fine too"])
    assert engine.aborted and not engine.running
    assert llm.generate("again").text == "again"


def test_a_grammar_is_made_ready_before_anything_runs(llm, engine):
    llm.generate("a", grammar=Grammar.regex("a"))
    assert engine.seen[-1].params.grammar == Grammar.regex("a")
    with pytest.raises(RequestError, match="Invalid type"):
        llm.generate(["a", "b"], grammar=Grammar.json_schema({"type": "nope"}))
    assert len(engine.seen) == 1


def test_more_prompts_than_the_engine_takes_at_once(monkeypatch):
    prompts = [f"prompt {i}" for i in range(20)]
    assert texts(LLM.over(FakeEngine(queue_limit=3)).generate(prompts)) == prompts
    with pytest.raises(QueueFull):
        LLM.over(FakeEngine(queue_limit=0)).generate("x")


def test_stream_joins_to_the_text_and_closing_it_aborts(llm, engine):
    pieces = list(llm.stream("hello"))
    assert "".join(piece.text for piece in pieces) == "hello" and pieces[-1].finish_reason is FinishReason.STOP
    stream = llm.stream("a long story")
    assert next(stream).text == "a"
    stream.close()
    assert engine.running == 0 and len(engine.aborted) == 1


def test_a_stream_and_a_call_share_the_engine(llm):
    stream = llm.stream("hello")
    first = next(stream).text
    assert llm.generate("in between").text == "in between"
    assert first + "".join(piece.text for piece in stream) == "hello"


def test_chat_answers_one_conversation_or_many(llm, engine):
    talk = [{"role": "user", "content": "hi"}]
    one = llm.chat(talk, skip_special_tokens=False, max_tokens=10)
    assert one.text == "<|user|>hi<|eos|><|assistant|>"[: len(one.text)] and one.text.startswith("<|user|>hi")
    assert len(llm.chat([talk, talk])) == 2
    assert next(llm.stream(talk)).request_id
    with pytest.raises(TokenizerError):
        llm.chat([{"role": "user", "content": "refuse me"}])


@pytest.mark.parametrize("prompt", [[1, "a"], [1.5], [True]])
def test_a_strange_prompt_is_refused(llm, prompt):
    with pytest.raises(RequestError, match="a prompt is text, a list of token ids, or a list of chat messages"):
        llm._encode(prompt)  # behind the annotations, which only tests check


def test_without_a_tokenizer_prompts_are_token_ids(engine):
    llm = LLM.over(engine)
    llm.tokenizer = None
    for prompt in ("text", [{"role": "user", "content": "hi"}]):
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.request(prompt)
    assert llm.generate([64, 65]).token_ids[:2] == (64, 65)


def test_threads_share_one_engine():
    llm, results = LLM.over(FakeEngine(step_seconds=0.001)), {}

    def work(name):
        results[name] = llm.generate([f"{name} {i}" for i in range(3)])

    threads = [threading.Thread(target=work, args=(f"thread {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: texts(done) for name, done in results.items()} == {
        f"thread {i}": [f"thread {i} {j}" for j in range(3)] for i in range(4)
    }  # fmt: skip


def test_works_under_a_running_event_loop(llm):
    async def cell():
        return llm.generate("in a notebook").text

    assert asyncio.run(cell()) == "in a notebook"


def test_a_lost_request_is_an_error_not_a_hang(llm, engine):
    stream = llm.stream("hello")
    next(stream)
    engine._running.clear()
    with pytest.raises(RuntimeError, match="idle although"):
        next(stream)


def test_closing_shuts_the_engine_down(engine):
    with LLM.over(engine) as llm:
        llm.generate("x")
    assert engine.closed


def test_settings_are_found_by_their_flat_names():
    config = engine_config(model="x", max_model_len="4k", mesh="tensor=4", page_size=16, memory_fraction=1, revision=None)
    assert (config.model.max_model_len, config.execution.mesh, config.cache.page_size) == (4096, MeshShape(1, 4), 16)
    assert engine_config(mesh={"data": 2}).execution.mesh == MeshShape(2, 1)
    assert engine_config(mesh=MeshShape(2, 2)).execution.mesh.size == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_length": 3}, "unknown setting 'max_model_length'; did you mean 'max_model_len'?"),
        ({"zzzz": 3}, "unknown setting 'zzzz'; known: cache"),
        ({"page_size": "32"}, "page_size must be int, got str"),
        ({"page_size": True}, "page_size must be int, got bool"),
        ({"mesh": {"model": 2}}, "the axes are data and tensor"),
        ({"mesh": 4}, "mesh must be MeshShape, got int"),
        ({"dtype": "float8"}, "--dtype 'float8' is not one of"),
    ],
)
def test_bad_settings_say_what_is_wrong(settings, message):
    with pytest.raises(ConfigError) as error:
        engine_config(**settings)
    assert message.removesuffix("cache") in str(error.value)


def test_generate_keeps_its_engine(monkeypatch):
    made = []

    def build(config, *, progress=None):
        made.append(config)
        return LLM.over(FakeEngine(info=replace(FakeInfo(), model=config.model.model)))

    monkeypatch.setattr(LLM, "build", build)
    monkeypatch.setattr(api, "_KEPT", api._KeptEngine())
    assert api.generate("one").text == "one"
    assert texts(api.generate(["two", "three"], max_tokens=2)) == ["tw", "th"]
    assert made == [EngineConfig()]
    api.generate("four", model="other", mesh="tensor=2", dtype="float32")
    assert len(made) == 2 and made[1].model.model == "other" and made[1].execution.mesh.tensor == 2
    with pytest.raises(ConfigError, match=r"page_size is a setting of the engine: use LLM\(page_size=...\)"):
        api.generate("x", page_size=3)
