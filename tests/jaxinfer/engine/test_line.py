"""The waiting line: in the policy's order, at a cost that does not depend on its length."""

import random
from collections import Counter

import pytest

from jaxinfer.cache.prefix import Chain
from jaxinfer.engine.line import PATIENCE, REFRESHED, Line
from jaxinfer.engine.sequence import Sequence
from jaxinfer.request import Request


def sequence(arrival, priority=0):
    request = Request(str(arrival), (1,), priority=priority)
    return Sequence(request, request.ids[:], 1, arrival, Chain(("",)))


def by_priority(waiting):
    return waiting.request.priority


def taken(line):
    return [line.take().arrival for _ in range(len(line))]


def test_smaller_keys_first_then_preempted_then_arrival():
    line = Line(by_priority)
    waiting = [sequence(0, 1), sequence(1), sequence(2, -1), sequence(3), sequence(4, 1)]
    waiting[3].preemptions = 1
    for one in waiting:
        line.push(one)
    assert waiting[0] in line and line.head() is waiting[2]
    assert taken(line) == [2, 3, 1, 0, 4]
    assert line.head() is None and line.take() is None


@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_of_joining_and_leaving_keeps_the_order(seed):
    draw, line, here = random.Random(seed), Line(by_priority), []
    for arrival in range(600):
        here.append(sequence(arrival, draw.randint(-3, 3)))
        line.push(here[-1])
        if draw.random() < 0.4:
            line.remove(here.pop(draw.randrange(len(here))))
        line.refresh()
    line.remove(sequence(0))
    assert len(line) == len(here) > PATIENCE
    expected = sorted(here, key=lambda s: (s.request.priority, s.arrival))
    assert [line.take() for _ in range(100)] == expected[:100]


def test_nobody_is_overtaken_for_ever():
    line = Line(by_priority)
    line.push(sequence(0, 9))
    order = []
    for arrival in range(1, 2 * PATIENCE):
        line.push(sequence(arrival))
        order.append(line.take().arrival)
    assert order[:PATIENCE] == list(range(1, PATIENCE + 1))
    assert order[PATIENCE] == 0
    assert 0 not in order[PATIENCE + 1 :]


def test_keys_that_change_are_noticed_a_few_at_a_time():
    cached, asked = Counter(), Counter()

    def key(waiting):
        asked[waiting.arrival] += 1
        return -cached[waiting.arrival]

    line = Line(key)
    for arrival in range(100):
        line.push(sequence(arrival))
    cached[77] = 8
    asked.clear()
    for _ in range(-(-100 // REFRESHED)):
        line.refresh()
    assert line.take().arrival == 77
    assert max(asked.values()) <= 2 and sum(asked.values()) <= 100 + REFRESHED


def test_left_entries_do_not_pile_up():
    line = Line(by_priority)
    stays = sequence(0)
    line.push(stays)
    for arrival in range(1, 2000):
        passing = sequence(arrival)
        line.push(passing)
        line.remove(passing)
        line.refresh()
    assert len(line._order) < 100 and len(line._ages) < 100
    assert line.head() is stays
