"""What a rest says in the end."""

import pytest

from jaxinfer.engine.resting import RESTING, Rest


def test_what_steps_took():
    rest = Rest(4)
    assert rest.left == RESTING and not rest.over and rest.launched == 0
    rest.left -= 2
    assert rest.launched == 2
    rest.ends += [5.0, 6.0, 8.5]
    assert rest.finish() == [1.0, 2.5] and rest.over  # the first is the end of the step before


@pytest.mark.parametrize("ends", [[], [3.0]])
def test_one_end_says_nothing(ends):
    assert Rest(1, ends=ends).finish() == []
