"""Every policy is a key: the order of the line follows from it."""

from types import SimpleNamespace

import pytest

from jaxinfer.config import ConfigError
from jaxinfer.engine import policies
from jaxinfer.request import Request


def waiter(priority=0, tokens=1, preemptions=0, cached=0):
    return SimpleNamespace(request=Request("r", (1,), priority=priority), tokens=[1] * tokens, preemptions=preemptions, cached=cached)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("priority", {"priority": -1}, {"priority": 0}), ("shortest", {"tokens": 2}, {"tokens": 3}),
        ("longest_prefix", {"cached": 8}, {"cached": 4}), ("shortest", {"tokens": 9, "preemptions": 1}, {"tokens": 1}),
        ("longest_prefix", {"preemptions": 1}, {"cached": 99}),
    ],
)  # fmt: skip
def test_orders(name, first, second):
    key = policies.find(name)
    assert isinstance(waiter(), policies.Waiting)
    assert key(waiter(**first)) < key(waiter(**second))


def test_first_come_first_served_knows_no_difference():
    assert policies.fcfs(waiter(3, 9, 1, 8)) == policies.fcfs(waiter())


@pytest.mark.parametrize("name", ["fcfs", "shortest", "longest_prefix"])
def test_priority_matters_to_its_policy_alone(name):
    key = policies.find(name)
    assert key(waiter(priority=5)) == key(waiter(priority=-5))


def test_policies_are_found_by_name():
    assert policies.names() == ["fcfs", "longest_prefix", "priority", "shortest"]


@pytest.mark.parametrize("name", ["random", "names", "find", "_is_policy", "Waiting", "Policy", "HEAD", "sys", ""])
def test_other_names_are_refused_with_the_list(name):
    with pytest.raises(ConfigError, match="choose one of fcfs, longest_prefix, priority, shortest"):
        policies.find(name)
