"""Types of request bodies: strict, with readable errors."""

import pytest
from pydantic import ValidationError

from jaxinfer.serve import schema
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.schema import ChatBody, CompletionBody, Message


@pytest.mark.parametrize(
    ("given", "made"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_the_four_forms_of_a_prompt(given, made):
    assert CompletionBody(prompt=given).prompt == made


@pytest.mark.parametrize("given", [[], [[]], None, 1, True, ["a", 1], [1, "a"], [True], [[1], "a"], {}, [[1.0]], ["a"] * 129])
def test_prompts_of_no_form(given):
    with pytest.raises(ApiError) as caught:
        CompletionBody(prompt=given)
    assert caught.value.body.param == "prompt"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "1"), ("temperature", True), ("max_tokens", 1.5), ("max_tokens", True), ("n", "2"), ("stream", 1),
        ("stream", "true"),
        ("stop", 3), ("stop", [3]), ("stop_token_ids", ["1"]), ("stop_token_ids", [True]), ("logit_bias", {"1": "x"}), ("seed", 1.0),
        ("stream_options", {"include_usage": "yes"}), ("logprobs", 1),
    ],
)  # fmt: skip
def test_numbers_are_no_strings_and_true_is_not_one(name, value):
    with pytest.raises(ValidationError):
        ChatBody(messages=[{"role": "user", "content": "a"}], **{name: value})


def test_content_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "refusal", "refusal": "c"}]
    assert Message(role="user", content=parts).content == "a\nb\nc"
    assert Message(role="assistant").content is None


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:"}}, {"type": "input_audio"}, {"type": "file"}, {"type": "video_url"}, {}, "a",
        {"type": "text"}, {"type": ["text"]}, {"type": "text", "text": 1},
    ],
)  # fmt: skip
def test_media_parts_are_refused(part):
    with pytest.raises(ApiError) as caught:
        Message(role="user", content=[part])
    assert caught.value.status == 400
    assert "text parts only" in str(caught.value)


@pytest.mark.parametrize("content", [1, True, {}, [{"type": "text", "text": "a"}] * (schema.MAX_PARTS + 1)])
def test_contents_of_no_form(content):
    with pytest.raises(ApiError):
        Message(role="user", content=content)


@pytest.mark.parametrize("extra", [{"tool_calls": [{}]}, {"tool_call_id": "x"}, {"function_call": {}}, {"audio": {}}])
def test_message_fields_that_would_be_left_out_are_refused(extra):
    with pytest.raises(ApiError) as caught:
        Message(role="assistant", content="a", **extra)
    assert caught.value.body.param == next(iter(extra))


def test_other_message_fields_are_kept_for_the_template():
    assert Message(role="assistant", content="a", reasoning_content="b", tool_calls=None).model_extra == {
        "reasoning_content": "b", "tool_calls": None,
    }  # fmt: skip


def test_messages_are_counted():
    message = {"role": "user", "content": "a"}
    assert len(ChatBody(messages=[message] * schema.MAX_MESSAGES).messages) == schema.MAX_MESSAGES
    for messages in ([], [message] * (schema.MAX_MESSAGES + 1)):
        with pytest.raises(ValidationError):
            ChatBody(messages=messages)
