"""Word lists hold clean, different words; made-up words are lower-case letters."""

import random

import pytest

from checkpoints import words


@pytest.mark.parametrize("name", ["NOUNS", "ADJECTIVES", "VERBS", "NAMES", "SURNAMES"])
def test_lists_hold_different_words(name: str):
    listed = getattr(words, name)
    assert len(listed) > 50 and len(set(listed)) == len(listed) and all(word.isalpha() for word in listed)


def test_made_up_words_are_letters_and_various():
    rng = random.Random(0)
    found = [words.made_up_word(rng) for _ in range(500)]
    assert all(word.isalpha() and word.islower() for word in found) and len(set(found)) > 400


def test_any_word_is_mostly_a_listed_one():
    rng = random.Random(0)
    listed = {*words.NOUNS, *words.ADJECTIVES}
    assert 0.75 < sum(words.any_word(rng) in listed for _ in range(1000)) / 1000 < 0.95
