"""The real engine with the embedded model behind the real server, asked by the official client."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import jsonschema
import openai
import pytest

from jaxinfer.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from jaxinfer.engine.engine import Engine
from jaxinfer.selftest.schemas import random_schema
from tests.fakes import LiveServer, until

CONFIG = EngineConfig(
    model=ModelConfig(model="demo", max_model_len=256),
    cache=CacheConfig(page_size=16, kv_tokens=2048),
    scheduler=SchedulerConfig(max_sequences=2, max_step_tokens=32),
)
SUM = [{"role": "user", "content": "What is 27 + 58?"}]


@pytest.fixture(scope="module")
def live():
    with LiveServer(lambda progress: Engine(CONFIG, progress=progress)) as server:
        until(lambda: httpx2.get(server.url + "/health").status_code == 200 or server.loop.failure, 110)
        yield server


@pytest.fixture(scope="module")
def official(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0, timeout=60) as official:
        yield official


def test_the_demo_knows_something(official):
    answer = official.chat.completions.create(model="demo", messages=SUM, temperature=0)
    assert "85" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


def test_a_stream_is_the_plain_answer_with_true_usage(official):
    options = {"model": "demo", "prompt": ["Once upon a time", "The sea was"], "max_tokens": 12, "temperature": 0, "logprobs": 2, "n": 2}
    plain = official.completions.create(**options)
    texts, tokens = ["", "", "", ""], [[], [], [], []]
    for chunk in official.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
    assert texts == [choice.text for choice in plain.choices]
    assert texts[0] == texts[1] != texts[2]
    for choice, streamed in zip(plain.choices, tokens, strict=True):
        assert streamed == pytest.approx(choice.logprobs.token_logprobs, abs=1e-3)
        assert "".join(choice.logprobs.tokens) == choice.text
        assert all(top[token] <= 0 for token, top in zip(choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True))
    assert chunk.usage == plain.usage
    assert plain.usage.completion_tokens == 48


def test_a_seed_repeats_a_sample_and_choices_differ(official):
    options = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 16, "temperature": 1.2, "seed": 7, "n": 3}
    first, second = (official.completions.create(**options) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) > 1


def test_stops_bias_and_penalties_reach_the_device(official, live):
    tokens = httpx2.post(live.url + "/tokenize", json={"prompt": " the", "add_special_tokens": False}).json()["tokens"]
    biased = official.completions.create(
        model="demo", prompt="Once upon", max_tokens=4, temperature=0, logit_bias={str(tokens[0]): 100}, stop=["the the the"]
    )
    assert biased.choices[0].finish_reason == "stop"
    assert biased.choices[0].stop_reason == "the the the"
    assert biased.choices[0].text == " "


def check_schema(official, seed):
    """The model's answer under a random schema is whole and valid, whatever the model thinks of it."""
    schema = random_schema(seed)
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    options = {"temperature": seed % 3 / 2, "seed": seed, "max_tokens": 210}
    choice = official.chat.completions.create(model="demo", messages=SUM, response_format=form, **options).choices[0]
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content), schema)


@pytest.mark.parametrize("seed", range(8))
def test_answers_keep_to_their_schema(official, seed):
    check_schema(official, seed)


@pytest.mark.ci
def test_answers_keep_to_200_schemas(official):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: check_schema(official, seed), range(1000, 1200)))


def test_other_ways_to_ask_for_a_shape(official):
    def ask(**extra):
        choice = official.completions.create(model="demo", prompt="Once", max_tokens=40, temperature=1, seed=1, extra_body=extra).choices[0]
        return choice.finish_reason, choice.text

    assert ask(structured_outputs={"choice": ["yes", "no"]}) in [("stop", "yes"), ("stop", "no")]
    assert re.fullmatch("[0-9]{3}-[a-z]{2}", ask(guided_regex="[0-9]{3}-[a-z]{2}")[1])
    assert re.fullmatch("(ab)+", ask(structured_outputs={"grammar": 'root ::= "ab" | "ab" root'})[1])
    with pytest.raises(openai.BadRequestError) as caught:
        ask(structured_outputs={"json": {"type": "nope"}})
    assert caught.value.param == "structured_outputs"


def test_clients_that_leave_free_their_pages(live, official):
    scheduler = live.loop.loaded.scheduler
    body = {"prompt": "Once upon a time", "max_tokens": 240, "ignore_eos": True, "stream": True, "n": 2}
    survivor = []

    def stay():
        survivor.append(official.chat.completions.create(model="demo", messages=SUM, temperature=0).choices[0].message.content)

    with httpx2.stream("POST", live.url + "/v1/completions", json=body, timeout=30) as response:
        assert next(response.iter_lines()).startswith("data: ")
        staying = threading.Thread(target=stay)
        staying.start()
    staying.join(30)
    until(lambda: scheduler.usage == 0 and scheduler.running == 0 and scheduler.waiting == 0, 5)
    assert "85" in survivor[0]
    assert live.loop.loaded.metrics.finished["abort"] >= 1


def test_what_cannot_fit_is_told_at_once(official):
    with pytest.raises(openai.BadRequestError) as caught:
        official.completions.create(model="demo", prompt="word " * 400, max_tokens=5)
    assert caught.value.code == "context_length_exceeded"


def test_metrics_tell_of_it(live):
    text = httpx2.get(live.url + "/metrics").text
    assert 'vllm:generation_tokens_total{engine="0",model_name="demo"}' in text
    assert "jaxinfer_step_seconds_count" in text
    info = httpx2.get(live.url + "/server_info").json()
    assert (
        info["sampling_defaults"]["temperature"]
        == json.loads(httpx2.get(live.url + "/server_info").text)["sampling_defaults"]["temperature"]
    )
    assert info["kv_tokens"] == 2048
