"""Which steps belong to a rest."""

import pytest

from jaxinfer.batch import Batch, Row
from jaxinfer.engine.resting import Rest
from jaxinfer.request import Request

ROW = (Row(Request("0", (1,)), 0, 0, (1,), (1,), samples=True),)
PLAIN, PROMPTS = Batch(ROW, ()), Batch(ROW, ROW)


def test_so_many_steps_whatever_they_do():
    rest = Rest(1, 3)
    assert [rest.takes(batch) for batch in (PROMPTS, PLAIN, PLAIN, PLAIN)] == [True, True, True, False]
    assert rest.due and (rest.launched, rest.plain, rest.over) == (3, 2, False)


@pytest.mark.parametrize(("more", "ends"), [((PLAIN, PROMPTS), [True, False]), ((PLAIN, PLAIN, PLAIN, PROMPTS), [True, True, True, False])])
def test_one_that_ends_late_ends_with_prompts(more, ends):
    """Or after twice as many steps."""
    rest = Rest(1, 3, late=True)
    assert all(rest.takes(batch) for batch in (PROMPTS, PLAIN, PLAIN)) and not rest.due
    assert [rest.takes(batch) for batch in more] == ends and rest.due == (len(more) > 2)
