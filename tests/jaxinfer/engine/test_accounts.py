"""Broken accounts are seen one by one; what holds is what every scheduler test checks."""

from dataclasses import replace

import pytest

from jaxinfer.engine.accounts import Accounts, check
from jaxinfer.engine.scheduler import Limits
from jaxinfer.request import Request
from tests.jaxinfer.conftest import scheduler


def accounts():
    line = scheduler(Limits(2, 8, 2), 9)
    line.add(Request("a", (1, 2, 3)))
    line.add(Request("b", (4, 5)))
    line.schedule()
    return Accounts(line.limits, line.pools, line._running, [], [], [])


def test_what_holds_holds():
    check(accounts())


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("more tokens computed", {"computed": 99}), ("draws more tokens", {"pending": 3}), ("draws more tokens", {"limit": 0}),
        ("order of their standing", {"arrival": 7}), ("used twice", {"slot": 1}),
    ],
)  # fmt: skip
def test_what_is_broken_is_seen(match, changes):
    found = accounts()
    for name, value in changes.items():
        setattr(found.running[0], name, value)
    with pytest.raises(RuntimeError, match=match):
        check(found)


def test_drafts_may_all_stand():
    found = accounts()
    found.running[0].pending, found.running[0].drafts = 3, 2
    check(found)
    with pytest.raises(RuntimeError, match="lost or used twice"):
        check(replace(found, slots=[1]))
