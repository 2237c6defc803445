"""Every planted bug is seen by the machine, and gone when it is taken out again."""

import pytest

from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.selftest.machine import play
from jaxinfer.selftest.mutations import MUTATIONS, planted


def test_there_are_at_least_twenty():
    assert len(MUTATIONS) >= 20
    assert all(make.__doc__ for _, _, make in MUTATIONS.values())


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_machine_sees(name):
    with planted(name), pytest.raises((RuntimeError, ValueError, KeyError, IndexError)):
        for seed in range(80):
            play(seed, 400)


def test_a_bug_is_taken_out_again():
    right = Scheduler.finish
    with planted("leak_on_abort"):
        assert Scheduler.finish is not right
    assert Scheduler.finish is right
    play(0, 200)
