"""Tokens and their probabilities in both of the API's forms."""

import pytest

from jaxinfer.request import TokenLogprob
from jaxinfer.serve import logprobs, wire
from tests.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()


def ids(text):
    return TOKENIZER.encode(text)


def test_chat_tokens_have_text_bytes_and_alternatives():
    first, second = ids("é")
    content = logprobs.chat(TOKENIZER, [TokenLogprob(first, -0.5, ((first, -0.5), (second, float("-inf"))))]).content
    assert content[0].bytes == [0xC3]
    assert content[0].token == "\ufffd"
    assert content[0].top_logprobs[0].logprob == -0.5
    assert content[0].top_logprobs[1].bytes == [0xA9]
    assert content[0].top_logprobs[1].logprob == wire.LOWEST_LOGPROB


def test_the_sampled_token_is_always_among_a_completions_alternatives():
    h, x, y = ids("hxy")
    entries = [TokenLogprob(h, -3.25, ((x, -0.5), (y, -1.0), (h, -3.25))), TokenLogprob(x, -0.5, ((x, -0.5),))]
    lists = logprobs.CompletionWriter(TOKENIZER, 2).write([h, x], entries)
    assert lists.tokens == ["h", "x"]
    assert lists.token_logprobs == [-3.25, -0.5]
    assert lists.top_logprobs == [{"x": -0.5, "y": -1.0, "h": -3.25}, {"x": -0.5}]
    assert lists.text_offset == [0, 1]


def test_offsets_count_characters_not_bytes():
    writer = logprobs.CompletionWriter(TOKENIZER, 0, offset=10)
    tokens = ids("aé€b")
    offsets = [writer.write([token], [TokenLogprob(token, -1.0)]).text_offset[0] for token in tokens]
    assert offsets == [10, 11, 11, 12, 12, 12, 13]


def test_a_prompt_begins_without_numbers_and_its_special_tokens_take_no_room():
    bos, a, b = [TOKENIZER.bos_id, *ids("ab")]
    writer = logprobs.CompletionWriter(TOKENIZER, 1, without_text=TOKENIZER.special_ids)
    lists = writer.write([bos, a, b], [None, TokenLogprob(a, -2.0, ((b, -1.0), (a, -2.0))), TokenLogprob(b, -0.5, ((b, -0.5),))])
    assert lists.tokens == ["<|bos|>", "a", "b"]
    assert lists.token_logprobs == [None, -2.0, -0.5]
    assert lists.top_logprobs == [None, {"b": -1.0, "a": -2.0}, {"b": -0.5}]
    assert lists.text_offset == [0, 0, 1]


def test_a_prompt_in_vllms_form():
    a, b = ids("ab")
    rows = logprobs.prompt(TOKENIZER, [None, TokenLogprob(a, -2.0, ((b, -1.0), (a, -2.0)), 2), TokenLogprob(b, float("-inf"), (), 9)], 1)
    as_dict = {str(a): wire.PromptLogprob(-2.0, 2, "a"), str(b): wire.PromptLogprob(-1.0, 1, "b")}
    assert rows == [None, as_dict, {str(b): wire.PromptLogprob(wire.LOWEST_LOGPROB, 9, "b")}]


@pytest.mark.parametrize(("index", "name"), [(0, "bytes:\\xe2"), (1, "bytes:\\x82")])
def test_tokens_that_are_no_character_have_names_of_their_own(index, name):
    assert logprobs.key(TOKENIZER, ids("€")[index]) == name
