"""Prompt lookup against a search through the whole text."""

import random

import pytest

from jaxinfer.engine.proposers.lookup import AT_ONCE, Lookup, LookupProposer
from jaxinfer.engine.scheduler import Limits
from jaxinfer.request import Request
from tests.jaxinfer.conftest import scheduler


def longest(text):
    """Length of the longest end of `text` that occurs before."""
    most = 0
    for size in range(1, len(text)):
        if any(text[at : at + size] == text[-size:] for at in range(len(text) - size)):
            most = size
    return most


@pytest.mark.parametrize("letters", [1, 2, 3, 9])
def test_the_match_is_the_longest_and_its_place_is_right(letters):
    draw = random.Random(letters)
    lookup, text = Lookup(), []
    for _ in range(120):
        text.append(draw.randrange(letters) if draw.random() < 0.7 or len(text) < 9 else text[-9])
        lookup.extend(text[-1:])
        length, following = lookup.match
        assert length == longest(text)
        if length:
            assert 0 < following < len(text)
            assert text[following - length : following] == text[-length:]
            drafts = list(lookup.propose(5))
            for place, draft in enumerate(drafts):  # what followed; past the end, what has been proposed just now
                assert draft == (text + drafts)[following + place]


def test_nothing_is_proposed_without_a_repetition():
    lookup = Lookup()
    assert (lookup.match.length, list(lookup.propose(3)), len(lookup)) == (0, [], 0)
    lookup.extend((1, 2, 3, 4))
    assert list(lookup.propose(3)) == []
    lookup.extend((2,))
    assert list(lookup.propose(3)) == [3, 4, 2]


def test_the_latest_occurrence_counts():
    lookup = Lookup()
    lookup.extend((7, 8, 1, 7, 8, 2, 7, 8, 3, 7, 8))
    assert lookup.propose(1) == [3]


def test_tokens_come_one_by_one_or_together():
    text = [random.Random(5).randrange(4) for _ in range(200)]
    one, together = Lookup(), Lookup()
    for token in text:
        one.extend((token,))
    together.extend(text)
    assert one.match == together.match and one.text == together.text


def test_growing_costs_the_same_however_long_the_text_is():
    lookup = Lookup()
    lookup.extend([random.Random(3).randrange(50) for _ in range(20_000)])
    assert len(lookup._link) < 2 * len(lookup.text) + 2


def sequence_of(*prompt):
    return scheduler(Limits(1, 8, 1), 9).add(Request("a", prompt))


def test_a_proposer_follows_a_sequence():
    proposer, sequence = LookupProposer(), sequence_of(1, 2, 3, 4)
    assert proposer.propose(sequence, 3) is None
    sequence.tokens.extend([9, 1, 2])
    assert proposer.propose(sequence, 3) == ((3, 4, 9), "lookup 2")
    sequence.tokens.extend([3, 4])
    assert proposer.propose(sequence, 2) == ((9, 1), "lookup 3-4")
    proposer.forget(sequence.request.key)
    assert proposer.propose(sequence, 1) is not None


def test_a_long_prompt_is_read_in_parts():
    proposer, sequence = LookupProposer(), sequence_of(*range(AT_ONCE), 0, 1, 2)
    assert proposer.propose(sequence, 2) is None
    proposer.rest()
    assert proposer.propose(sequence, 2) == ((3, 4), "lookup 3-4")
