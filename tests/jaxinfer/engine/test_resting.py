"""Which steps belong to a rest."""

import pytest

from jaxinfer.batch import Batch, Row
from jaxinfer.engine.resting import TIMED, Rest, Span
from jaxinfer.request import Request

ROW = (Row(Request("0", (1,)), 0, 0, (1,), (1,), samples=True),)
PLAIN, PROMPTS, ONE = Batch(ROW * 2, ()), Batch(ROW, ROW), Batch(ROW, ())
ROWS = Span(2, 3)


def test_so_many_steps_prompts_or_not():
    rest = Rest(4, ROWS, 3)
    assert [rest.takes(batch) for batch in (PROMPTS, PLAIN, PLAIN, PLAIN)] == [True, True, True, False]
    assert rest.due and (rest.launched, rest.plain, rest.over, rest.behind) == (3, 2, False, False)


def test_it_tells_what_plain_steps_take_behind_neither_its_beginning_nor_prompts():
    """Steps of a second each, the first ones and those close behind prompts longer."""
    now, told = [0.0], []
    rest = Rest(4, ROWS, 99, clock=lambda: now[0])
    for number in range(1, 40):
        prompts = number == 19
        slow = number <= TIMED or 19 <= number <= 19 + TIMED
        now[0] += 5.0 if slow else 1.0
        assert rest.takes(PROMPTS if prompts else PLAIN)
        told.append(rest.seconds)
    assert told[: 2 * TIMED - 1] == [0.0] * (2 * TIMED - 1) and set(told[2 * TIMED - 1 :]) == {1.0}


@pytest.mark.parametrize("rows", [1, 4])
def test_other_numbers_of_rows_end_it(rows):
    """What does not pay for some may for others."""
    rest = Rest(4, ROWS, 3)
    assert rest.takes(PROMPTS) and rest.behind and not rest.takes(Batch(ROW * rows, ())) and not rest.due


@pytest.mark.parametrize(("more", "ends"), [((PLAIN, PROMPTS), [True, False]), ((PLAIN, PLAIN, PLAIN, PROMPTS), [True, True, True, False])])
def test_one_that_a_draft_model_sits_out_ends_with_prompts(more, ends):
    """Or after twice as many steps."""
    rest = Rest(4, ROWS, 3, prompts_after=3)
    assert all(rest.takes(batch) for batch in (PROMPTS, PLAIN, PLAIN)) and not rest.due
    assert [rest.takes(batch) for batch in more] == ends and rest.due == (len(more) > 2)


def test_one_behind_a_rest_without_prompts_ends_with_the_first():
    assert not Rest(4, ROWS, 3, prompts_after=0).takes(PROMPTS)
