"""A sequence's clocks, and who keeps its pages longest."""

from array import array

import pytest

from jaxinfer.cache.prefix import Chain, PrefixIndex
from jaxinfer.engine.sequence import PATIENCE, Sequence
from jaxinfer.request import Request, SamplingParams


def sequence(arrival=0, priority=0, limit=3, preemptions=0, **changes):
    made = Sequence(Request("r", (1, 2, 3), priority=priority), array("i", [1, 2, 3]), limit, arrival, Chain(("",)))
    made.preemptions = preemptions
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_what_is_drawn_counts_before_it_is_known():
    made = sequence(computed=3, pending=1)
    assert (made.length, made.missing, made.output, made.last) == (4, 1, [], False)
    made.tokens.append(9)
    made.pending = 0
    assert (made.length, made.missing, made.output, made.last) == (4, 1, [9], False)


@pytest.mark.parametrize(
    ("known", "pending", "last"), [(0, 1, False), (1, 1, False), (2, 0, False), (2, 1, True), (1, 2, True), (3, 0, True)]
)
def test_the_last_token_is_on_its_way_when_the_limit_is_reached(known, pending, last):
    assert sequence(tokens=array("i", [1, 2, 3] + [7] * known), pending=pending).last == last


def test_the_cached_length_is_looked_up_when_it_is_read():
    index = PrefixIndex(1)
    made = sequence(chain=Chain(("",), (PrefixIndex(1), index)))
    assert (made.cached, sequence().cached) == (0, 0)
    index.enter(Chain(("",)), [1, 2, 3], (4, 5, 6), 3)
    assert made.cached == 2


def test_standing_goes_by_priority_then_arrival_until_patience_ends():
    order = [sequence(9, 5, preemptions=PATIENCE), sequence(3, -1), sequence(1), sequence(2), sequence(0, 1, preemptions=PATIENCE - 1)]
    assert sorted(reversed(order), key=lambda s: s.standing) == order


def test_a_prompt_that_is_scored_is_computed_whole():
    index = PrefixIndex(1)
    index.enter(Chain(("",)), [1, 2, 3], (4, 5, 6), 3)
    scored = Request("r", (1, 2, 3), SamplingParams(prompt_logprobs=0))
    made = sequence(chain=Chain(("",), (index,)), request=scored)
    assert (made.whole, made.cached, made.begins_like(made)) == (True, 0, False)
    assert sequence().begins_like(sequence()) and not sequence().whole
