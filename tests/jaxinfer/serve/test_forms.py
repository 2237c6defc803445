"""What chat and text answers look like, choice by choice."""

import msgspec
import pytest

from jaxinfer.request import FinishReason, Output, Request, SamplingParams, TokenLogprob, choices
from jaxinfer.serve import wire
from jaxinfer.serve.convert import Call
from jaxinfer.serve.forms import ChatForm, CompletionForm
from tests.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()
USAGE = wire.Usage(1, 2, 3)


def call(n=2, logprobs=None, echo=(), **values):
    sequences = tuple(choices(Request("r", (1,), SamplingParams(n=n))))
    return Call("id", "m", 7, ((1,),), sequences, echo, logprobs, **values)


def out(text="", reason=None, logprobs=()):
    return Output("r", text=text, finish_reason=reason, logprobs=logprobs, token_ids=(1,))


def test_a_role_comes_first_once_for_each_choice():
    form = ChatForm(call(), TOKENIZER)
    deltas = [form.chunk(choice, out("x")).choices[0].delta for choice in (0, 0, 1)]
    assert [delta.role for delta in deltas] == ["assistant", None, "assistant"]


def test_an_output_without_anything_to_see_makes_no_chunk():
    form = ChatForm(call(), TOKENIZER)
    assert form.chunk(0, out()).choices[0].delta == wire.Delta("assistant", "")
    assert form.chunk(0, out()) is None
    last = form.chunk(0, out(reason=FinishReason.LENGTH)).choices[0]
    assert (last.delta, last.finish_reason) == (wire.Delta(), "length")
    assert CompletionForm(call(), TOKENIZER).chunk(0, out()) is None


def test_tokens_without_text_still_show_their_logprobs():
    entry = TokenLogprob(TOKENIZER.encode("é")[0], -1.0)
    form = ChatForm(call(logprobs=0), TOKENIZER)
    form.chunk(0, out("a"))
    chunk = form.chunk(0, out(logprobs=(entry,)))
    assert chunk.choices[0].delta.content == ""
    assert len(chunk.choices[0].logprobs.content) == 1


@pytest.mark.parametrize("kind", [ChatForm, CompletionForm])
def test_logprobs_are_null_unless_asked_for(kind):
    entry = TokenLogprob(1, -1.0)
    assert kind(call(), TOKENIZER).chunk(0, out("a", logprobs=(entry,))).choices[0].logprobs is None
    assert kind(call(logprobs=1), TOKENIZER).chunk(0, out("a", logprobs=(entry,))).choices[0].logprobs is not None


def test_echo_comes_before_the_first_words_of_each_choice():
    form = CompletionForm(call(echo=("say ",)), TOKENIZER)
    assert [form.chunk(choice, out("x")).choices[0].text for choice in (0, 0, 1)] == ["say x", "x", "say x"]
    whole = form.whole([[out("a"), out("b", FinishReason.STOP)], [out("c", FinishReason.LENGTH)]], USAGE)
    assert [(c.text, c.finish_reason, c.index) for c in whole.choices] == [("say ab", "stop", 0), ("say c", "length", 1)]
    assert whole.usage == USAGE


def test_whole_messages():
    whole = ChatForm(call(), TOKENIZER).whole([[out("a"), out("b", FinishReason.STOP)], [out("", FinishReason.LENGTH)]], USAGE)
    assert [c.message.content for c in whole.choices] == ["ab", ""]
    assert (whole.id, whole.created, whole.model, whole.usage) == ("id", 7, "m", USAGE)


SCORED = Output("r", text="x", token_ids=(5,), logprobs=(TokenLogprob(5, -2.0),), prompt_logprobs=(None,), finish_reason=FinishReason.STOP)


def test_an_echo_with_logprobs_begins_the_lists_with_the_prompt():
    form = CompletionForm(call(logprobs=1, echo=('"',)), TOKENIZER)
    lists = form.whole([[SCORED]], USAGE).choices[0].logprobs
    assert (lists.token_logprobs, lists.text_offset) == ([None, -2.0], [0, 1])
    assert form.chunk(0, SCORED).choices[0].logprobs.token_logprobs == [None, -2.0]


@pytest.mark.parametrize("kind", [ChatForm, CompletionForm])
def test_prompt_logprobs_and_token_ids_are_there_when_asked_for(kind):
    for asked in (True, False):
        form = kind(call(1, prompt_logprobs=0 if asked else None, token_ids=asked), TOKENIZER)
        whole = msgspec.to_builtins(form.whole([[SCORED]], USAGE))
        choice = whole["choices"][0]
        place = whole if kind is ChatForm else choice
        assert choice.get("token_ids") == ([5] if asked else None)
        assert place.get("prompt_token_ids") == ([1] if asked else None)
        assert place.get("prompt_logprobs", "absent") == ([None] if asked else "absent")


@pytest.mark.parametrize("kind", [ChatForm, CompletionForm])
def test_ids_of_the_prompt_come_in_the_first_chunk_and_every_token_in_one(kind):
    form = kind(call(1, token_ids=True), TOKENIZER)
    first, second = (msgspec.to_builtins(form.chunk(0, out())) for _ in range(2))
    place = (lambda chunk: chunk) if kind is ChatForm else (lambda chunk: chunk["choices"][0])
    assert place(first)["prompt_token_ids"] == [1]
    assert "prompt_token_ids" not in place(second)
    assert [chunk["choices"][0]["token_ids"] for chunk in (first, second)] == [[1], [1]]


@pytest.mark.parametrize("kind", [ChatForm, CompletionForm])
def test_the_usage_chunk_has_no_choices(kind):
    chunk = kind(call(), TOKENIZER).usage_chunk(USAGE)
    assert (chunk.choices, chunk.usage) == ([], USAGE)
