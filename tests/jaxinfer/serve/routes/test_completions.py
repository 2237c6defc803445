"""POST /v1/completions through plain HTTP and the official client."""

import json

import openai
import pytest

from tests.fakes import events


@pytest.fixture(scope="module")
def official(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as official:
        yield official


def test_the_four_forms_of_a_prompt(official, live):
    ids = live.fake.tokenizer.encode("ab")
    for prompt, texts in [("ab", ["ab"]), (["ab", "c"], ["ab", "c"]), (ids, ["ab"]), ([ids, ids[:1]], ["ab", "a"])]:
        answer = official.completions.create(model="fake", prompt=prompt)
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}
        assert answer.usage.prompt_tokens == sum(map(len, texts))
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_the_plain_answer_in_pieces(official):
    options = {"model": "fake", "prompt": ["hello", "worlds"], "n": 2, "max_tokens": 4}
    plain = official.completions.create(**options)
    texts, reasons, usage = {}, {}, None
    for chunk in official.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert texts == {choice.index: choice.text for choice in plain.choices} == {0: "hell", 1: "ello", 2: "worl", 3: "orld"}
    assert reasons == {choice.index: choice.finish_reason for choice in plain.choices}
    assert usage == plain.usage


def test_usage_comes_last_and_only_when_asked_for(client):
    answer = client.post("/v1/completions", json={"prompt": "hi", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    assert all("usage" not in json.loads(chunk) for chunk in chunks)
    body = {"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, _ = (json.loads(e) if e != "[DONE]" else e for e in events(client.post("/v1/completions", json=body).text))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def test_logprobs(official):
    lists = official.completions.create(model="fake", prompt="abc", logprobs=2, max_tokens=3).choices[0].logprobs
    assert lists.tokens == ["a", "b", "c"]
    assert lists.text_offset == [0, 1, 2]
    assert all(
        token in top and top[token] == p for token, top, p in zip(lists.tokens, lists.top_logprobs, lists.token_logprobs, strict=True)
    )
    assert official.completions.create(model="fake", prompt="abc", max_tokens=1).choices[0].logprobs is None


@pytest.mark.parametrize("limit", [0, 1])
def test_the_harness_scores_a_continuation(official, live, limit):
    """What lm-evaluation-harness reads: numbers of the prompt's tokens after the context, each within its alternatives."""
    ids = live.fake.tokenizer.encode("abcd")
    answer = official.completions.create(model="fake", prompt=[ids, ids[:2]], echo=True, logprobs=1, max_tokens=limit)
    assert [choice.text for choice in answer.choices] == (["abcd", "ab"] if limit == 0 else ["abcda", "aba"])
    assert answer.usage.completion_tokens == 2 * limit
    for choice, count in zip(answer.choices, (4, 2), strict=True):
        lists = choice.logprobs
        assert lists.token_logprobs == [None, *([-1.5] * (count - 1)), *([-0.5] * limit)]
        assert lists.top_logprobs[0] is None
        assert all(top[token] == p for token, top, p in list(zip(lists.tokens, lists.top_logprobs, lists.token_logprobs, strict=True))[1:])
        assert lists.text_offset == list(range(count + limit))
        assert choice.finish_reason == "length"
    chunks = list(official.completions.create(model="fake", prompt=ids, echo=True, logprobs=1, max_tokens=limit, stream=True))
    assert [p for chunk in chunks for p in chunk.choices[0].logprobs.token_logprobs] == answer.choices[0].logprobs.token_logprobs


def test_prompt_logprobs_and_token_ids(client, live):
    ids = live.fake.tokenizer.encode("ab")
    body = {"prompt": "ab", "max_tokens": 1, "prompt_logprobs": 1, "return_token_ids": True}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"], choice["logprobs"]) == (ids, ids[:1], None)
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second[str(ids[1])] == {"logprob": -1.5, "rank": 3, "decoded_token": "b"}
    assert len(second) == 2


def test_echo_stops_and_limits(official):
    assert official.completions.create(model="fake", prompt="abc", echo=True).choices[0].text == "abcabc"
    stopped = official.completions.create(model="fake", prompt="abcdef", stop=["d"]).choices[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("abc", "stop", "d")
    kept = official.completions.create(model="fake", prompt="abcdef", stop="d", extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == "abcd"
    on = official.completions.create(model="fake", prompt="ab", max_tokens=5, extra_body={"ignore_eos": True}).choices[0]
    assert (on.text, on.finish_reason) == ("ababa", "length")
    assert len(official.completions.create(model="fake", prompt="abcdefghijklmnopqrstuvwxyz").choices[0].text) == 16


def test_all_fields_reach_the_engine(client, live):
    body = {
        "prompt": "field by field", "temperature": 0.3, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": -3, "presence_penalty": 0.5,
        "frequency_penalty": 0.25, "repetition_penalty": 1.1, "logit_bias": {"5": 2}, "max_tokens": 3, "min_tokens": 1,
        "stop_token_ids": [9], "skip_special_tokens": False, "priority": 3, "user": "me", "metadata": {"a": "b"},
        "add_special_tokens": False, "bad_words": ["no", "nor"], "allowed_token_ids": [5, 3], "prompt_logprobs": 2,
    }  # fmt: skip
    assert client.post("/v1/completions", json=body).status_code == 200
    request = next(r for r in live.fake.seen if r.prompt == tuple(live.fake.tokenizer.encode("field by field")))
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.3, 0.9, 7, 0.1, -3)
    assert (params.bad_words, params.allowed_token_ids, params.prompt_logprobs) == (("no", "nor"), (5, 3), 2)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, 0.25, 1.1)
    assert (dict(params.logit_bias), params.stop.token_ids, params.skip_special_tokens, request.priority) == ({5: 2.0}, (9,), False, 3)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "prompt"), ({"prompt": "a", "model": "gpt-4"}, 404, "model"), ({"prompt": "a", "temperature": "hot"}, 400, "temperature"),
        ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens"), ({"prompt": "a" * 300}, 400, "prompt"), ({"prompt": [300]}, 400, "prompt"),
        ({"prompt": "a", "best_of": 4}, 400, "best_of"), ({"prompt": "a", "allowed_token_ids": []}, 400, "allowed_token_ids"),
        ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs"),
        ({"prompt": "a", "stream": True, "n": 99}, 400, "n"),
        ({"prompt": "a", "stream_options": {}}, 400, "stream_options"), ({"prompt": "REFUSE"}, 400, "prompt"),
        ({"prompt": "a", "stream": True, "stream_options": {"continuous_usage_stats": True}}, 400, "continuous_usage_stats"),
        ({"prompt": "a", "temperature": 10**400}, 400, "temperature"), ({"prompt": "a", "seed": 10**40}, 400, "seed"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(client, fault, body, status, param):
    fault(client.post("/v1/completions", json=body), status, param)


def test_errors_as_the_official_client_sees_them(official):
    with pytest.raises(openai.NotFoundError) as missing:
        official.completions.create(model="none", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        official.completions.create(model="fake", prompt="a", max_tokens=1000)
    assert long.value.code == "context_length_exceeded"
    assert long.value.request_id
