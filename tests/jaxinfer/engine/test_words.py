"""Words as token sequences, inside a text and after a blank."""

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from jaxinfer.engine import words
from jaxinfer.request import RequestError
from jaxinfer.step.slots import BANNED_LENGTH
from jaxinfer.tokenizer import Tokenizer
from tests.fakes import byte_tokenizer

BYTES = byte_tokenizer()


def merging():
    """A vocabulary in which the word has a token of its own after a blank, as in GPT-2's."""
    vocabulary = {piece: i for i, piece in enumerate(["a", "b", "c", "\u0120", "\u0120a", "ab", "\u0120ab"])}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u0120", "a"), ("\u0120a", "b"), ("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Tokenizer(core, {})


def test_a_word_with_a_token_of_its_own_after_a_blank_has_two_sequences():
    assert words.sequences(merging(), ["ab"]) == ((5,), (6,))
    assert words.sequences(merging(), [" ab", "abc"]) == ((5,), (6,), (5, 2), (6, 2))


def test_a_sequence_that_ends_in_the_shorter_one_is_covered():
    assert words.sequences(BYTES, ["hi"]) == (tuple(BYTES.encode("hi")),)
    assert words.sequences(BYTES, ["hi", " hi"]) == (tuple(BYTES.encode("hi")),)


def test_long_words_are_refused_by_name():
    assert len(words.sequences(BYTES, ["x" * BANNED_LENGTH])[0]) == BANNED_LENGTH
    for tokenizer, word in ((BYTES, "x" * (BANNED_LENGTH + 1)), (None, "x")):
        with pytest.raises(RequestError) as caught:
            words.sequences(tokenizer, [word])
        assert caught.value.param == "bad_words"


def test_no_words_need_nothing():
    assert words.sequences(None, ()) == ()


def test_what_the_vocabulary_cannot_write_gives_no_sequence():
    assert words.sequences(merging(), ["z"]) == ()
