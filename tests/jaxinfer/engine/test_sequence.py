"""A sequence's clocks, and who keeps its pages longest."""

import pytest

from jaxinfer.cache.prefix import Chain
from jaxinfer.engine.sequence import PATIENCE, Sequence
from jaxinfer.request import Request


def sequence(arrival=0, priority=0, limit=3, preemptions=0, **changes):
    made = Sequence(Request("r", (1, 2, 3), priority=priority), [1, 2, 3], limit, arrival, Chain(("",)), lambda s: 2 * len(s.tokens))
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
    assert sequence(tokens=[1, 2, 3] + [7] * known, pending=pending).last == last


def test_the_cached_length_is_looked_up_when_it_is_read():
    assert sequence().cached == 6


def test_standing_goes_by_priority_then_arrival_until_patience_ends():
    order = [sequence(9, 5, preemptions=PATIENCE), sequence(3, -1), sequence(1), sequence(2), sequence(0, 1, preemptions=PATIENCE - 1)]
    assert sorted(reversed(order), key=lambda s: s.standing) == order
