"""POST /v1/chat/completions through plain HTTP and the official client."""

import json

import openai
import pytest

from tests.fakes import events

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def official(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as official:
        yield official


def test_a_message(official):
    answer = official.chat.completions.create(model="fake", messages=HELLO, max_tokens=4)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", "hel", None)
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("length", 0, None)
    assert answer.object == "chat.completion"
    assert answer.usage.completion_tokens == 4


def test_a_stream_is_the_plain_answer_in_pieces(official):
    options = {"model": "fake", "messages": HELLO, "n": 3, "max_completion_tokens": 5, "max_tokens": 2}
    plain = official.chat.completions.create(**options)
    texts, roles, reasons = {}, [], {}
    for chunk in official.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            roles += [choice.index] if choice.delta.role == "assistant" else []
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.message.content for choice in plain.choices}
    assert sorted(roles) == [0, 1, 2]
    assert reasons == dict.fromkeys(range(3), "length")
    assert chunk.usage == plain.usage
    assert plain.usage.completion_tokens == 15


def test_the_clients_own_stream_helper(official):
    with official.chat.completions.stream(model="fake", messages=HELLO) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert text == final.choices[0].message.content == "hello"
    assert final.choices[0].finish_reason == "stop"


def test_logprobs(official):
    tokens = official.chat.completions.create(
        model="fake", messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=3, extra_body={"skip_special_tokens": False}
    )
    entries = tokens.choices[0].logprobs.content
    assert [entry.token for entry in entries] == ["<|user|>", "h", "e"]
    assert bytes(entries[1].bytes) == b"h"
    assert [top.token for top in entries[1].top_logprobs] == ["h", "i"]
    streamed = official.chat.completions.create(model="fake", messages=HELLO, logprobs=True, max_tokens=3, stream=True)
    collected = [entry for chunk in streamed for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])]
    assert [entry.token for entry in collected] == ["<|user|>", "h", "e"]
    assert collected[0].top_logprobs == []


def test_text_that_is_split_inside_a_character_arrives_whole(client):
    body = {"messages": [{"role": "user", "content": "h€llo wörld 🦊"}], "stream": True}
    *chunks, done = events(client.post("/v1/chat/completions", json=body).text)
    assert done == "[DONE]"
    pieces = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == "h€llo wörld 🦊"
    assert not any("\ufffd" in piece for piece in pieces)


def test_templates_and_roles(client):
    body = {
        "messages": [{"role": "developer", "content": "rule"}, {"role": "user", "content": [{"type": "text", "text": "ask"}]}],
        "chat_template_kwargs": {"prefix": "~"}, "skip_special_tokens": False, "max_completion_tokens": 200, "reasoning_effort": "none",
        "response_format": {"type": "text"}, "tool_choice": "none", "modalities": ["text"], "service_tier": "auto", "store": False,
    }  # fmt: skip
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"].startswith("<|system|>~rule<|eos|><|user|>~ask<|eos|><|assistant|>")


def test_continuing_a_message(client):
    messages = [*HELLO, {"role": "assistant", "content": "I was say"}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False, "skip_special_tokens": False}
    assert (
        client.post("/v1/chat/completions", json=body)
        .json()["choices"][0]["message"]["content"]
        .startswith("<|user|>hello<|eos|><|assistant|>I was say")
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"), ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "tool_call_id"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"), ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "refuse me"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 300}]}, "messages"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools"), ({"messages": HELLO, "top_logprobs": 1}, "top_logprobs"),
        ({"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": HELLO, "n": 2, "best_of": 3}, "best_of"),
        ({"messages": HELLO, "chat_template": "x"}, "chat_template"), ({"messages": HELLO, "logprobs": 3}, "logprobs"),
        ({"messages": HELLO, "structured_outputs": {"regex": "(a"}}, "structured_outputs"),
        ({"messages": HELLO, "max_tokens": True}, "max_tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(client, fault, body, param):
    fault(client.post("/v1/chat/completions", json=body), 400, param)
