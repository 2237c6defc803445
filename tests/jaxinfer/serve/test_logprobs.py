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
    lists = logprobs.CompletionWriter(TOKENIZER).write(
        [TokenLogprob(h, -3.25, ((x, -0.5), (y, -1.0))), TokenLogprob(x, -0.5, ((x, -0.5),))]
    )
    assert lists.tokens == ["h", "x"]
    assert lists.token_logprobs == [-3.25, -0.5]
    assert lists.top_logprobs == [{"x": -0.5, "y": -1.0, "h": -3.25}, {"x": -0.5}]
    assert lists.text_offset == [0, 1]


def test_offsets_count_characters_not_bytes():
    writer = logprobs.CompletionWriter(TOKENIZER, offset=10)
    tokens = ids("aé€b")
    offsets = [writer.write([TokenLogprob(token, -1.0)]).text_offset[0] for token in tokens]
    assert offsets == [10, 11, 11, 12, 12, 12, 13]


@pytest.mark.parametrize(("index", "name"), [(0, "bytes:\\xe2"), (1, "bytes:\\x82")])
def test_tokens_that_are_no_character_have_names_of_their_own(index, name):
    assert logprobs.key(TOKENIZER, ids("€")[index]) == name
