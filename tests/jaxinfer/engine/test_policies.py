"""Every policy gives back exactly the line it was given, in its own order, ties by arrival."""

import random
from collections import namedtuple
from itertools import count, islice

import pytest

from jaxinfer.config import ConfigError
from jaxinfer.engine import policies
from jaxinfer.request import Request

Waiter = namedtuple("Waiter", "request tokens")


def line(size, seed=0):
    draw = random.Random(seed)
    return [Waiter(Request(str(i), (1,), priority=draw.randint(-2, 2)), [1] * draw.randint(1, 4)) for i in range(size)]


def names(waiters):
    return [waiter.request.id for waiter in waiters]


@pytest.mark.parametrize("name", policies.names())
def test_a_policy_is_a_permutation(name):
    waiters = line(50)
    ordered = list(policies.find(name)(iter(waiters)))
    assert sorted(names(ordered)) == sorted(names(waiters))
    assert list(policies.find(name)(iter([]))) == []


@pytest.mark.parametrize(
    ("name", "key"),
    [("fcfs", lambda waiter: 0), ("priority", lambda waiter: waiter.request.priority), ("shortest", lambda waiter: len(waiter.tokens))],
)
def test_orders(name, key):
    waiters = line(50)
    assert names(policies.find(name)(waiters)) == names(sorted(waiters, key=key))


def test_first_come_first_served_reads_no_further_than_asked():
    endless = (Waiter(Request(str(i), (1,)), [1]) for i in count())
    assert names(islice(policies.find("fcfs")(endless), 3)) == ["0", "1", "2"]


def test_policies_are_found_by_name():
    assert policies.names() == ["fcfs", "priority", "shortest"]


@pytest.mark.parametrize("name", ["random", "names", "find", "_is_policy", "Waiting", "Policy", "sys", ""])
def test_other_names_are_refused_with_the_list(name):
    with pytest.raises(ConfigError, match="choose one of fcfs, priority, shortest"):
        policies.find(name)
