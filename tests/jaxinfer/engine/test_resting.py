"""Which steps belong to a rest."""

import random

import pytest

from jaxinfer.batch import Admission, Batch, Row
from jaxinfer.engine.resting import ENOUGH, STALE, TIMED, Rest, Span
from jaxinfer.request import Request

ROW = (Row(Request("0", (1,)), 0, 0, (1,), (1,), samples=True),)
PLAIN, PROMPTS, ONE = Batch(ROW * 2, ()), Batch(ROW, ROW), Batch(ROW, ())
ROWS = Span(2, 3)


def test_so_many_steps_prompts_or_not():
    rest = Rest(4, ROWS, 3)
    assert [rest.takes(batch) for batch in (PROMPTS, PLAIN, PLAIN, PLAIN)] == [True, True, True, False]
    assert rest.due and (rest.launched, rest.plain, rest.over, rest.behind) == (3, 2, False, False)


ENTERS = Batch(ROW * 2, (), (Admission(ROW[0].request, 0),))


@pytest.mark.parametrize("other", [PROMPTS, ENTERS])
def test_it_tells_what_plain_steps_take_behind_neither_its_beginning_nor_prompts(other):
    """Steps of a second each, the first ones and those close behind prompts longer, and before a sequence enters any time may pass."""
    now, told, at = [0.0], [], (ENOUGH + 1) * TIMED
    rest = Rest(4, ROWS, 999, clock=lambda: now[0])
    for number in range(1, 3 * at):
        now[0] += 100.0 if number == at + 3 else 5.0 if number <= TIMED or 0 < number - at - 3 <= TIMED else 1.0
        assert rest.takes(other if number == at + 3 else PLAIN)
        told.append(rest.seconds)
    assert told[: at - 1] == [0.0] * (at - 1) and set(told[at - 1 :]) == {1.0}


def test_a_step_that_was_held_up_tells_nothing():
    now, rest = [0.0], Rest(4, ROWS, 999)
    rest.clock = lambda: now[0]
    for number in range(6 * TIMED):
        now[0] += 1000.0 if number == 6 * TIMED - 1 else 1.0
        assert rest.takes(PLAIN)
    assert rest.seconds == 1.0 and max(rest.looks)[0] > 100


def test_what_was_seen_long_ago_tells_nothing():
    now, rest = [0.0], Rest(4, ROWS, 999)
    rest.clock = lambda: now[0]
    for number in range(5 * TIMED + STALE + 20):
        now[0] += 1.0
        assert rest.takes(PROMPTS if number > 5 * TIMED and number % TIMED == 0 else PLAIN)
    assert rest.seconds == 0.0 and rest.looks


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


@pytest.mark.parametrize("prompts_after", [None, 60])
@pytest.mark.parametrize("seed", range(4))
def test_steps_like_the_one_before_are_counted_as_all_others(seed, prompts_after):
    """A twin asks all that there is to ask of every step."""
    draw, now = random.Random(seed), [0.0]
    rests = [Rest(4, ROWS, 150, prompts_after=prompts_after, clock=lambda: now[0]) for _ in range(2)]
    kinds = [PLAIN] * 60 + [PROMPTS, ENTERS, Batch(ROW * 3, ()), ONE]
    for _ in range(400):
        now[0] += draw.random()
        batch = draw.choice(kinds)
        rests[1]._calm = 0
        assert rests[0].takes(batch) == rests[1].takes(batch)
        mine, its = ((each.launched, each.plain, each.behind, each.due, each.seconds, list(each.looks)) for each in rests)
        assert mine == its
