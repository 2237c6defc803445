"""Whether drafts seem to pay, and when plain steps are due."""

import pytest

from jaxinfer.engine.pace import APART, CURIOUS, FADING, FIRST, OLD, PATIENT, PUT_OFF, READING, RETURNS, WIDE, Excursions, Pace
from jaxinfer.engine.resting import LONGEST, SHORTEST


def test_drafts_seem_to_pay_until_they_were_asked_for_in_vain_a_few_times():
    pace = Pace()
    for _ in range(PATIENT - 1):
        pace.asked(believed=False)
        assert pace.drafting
    pace.asked(believed=False)
    assert not pace.drafting
    pace.asked(believed=True)
    assert pace.drafting and pace.vain == 0


def test_who_reads_on_and_on_is_doubted():
    pace = Pace()
    for _ in range(READING - 1):
        pace.asked(believed=False)
        pace.reading()
        assert pace.drafting
    pace.asked(believed=True)  # then it begins anew
    for _ in range(READING - 1):
        pace.reading()
    assert pace.drafting
    pace.reading()
    assert not pace.drafting


def test_looks_come_at_twice_the_age():
    pace = Pace(until=8)
    for until in (16, 20, 20):
        pace.look(5, 20)
        assert (pace.looks, pace.until) == (5, until)


def test_steady_plain_steps_are_looks_and_a_long_time_without_drafts_begins_anew():
    pace = Pace(looks=2, until=128, apart=0)
    pace.drafted()
    pace.plain(steady=False)
    assert (pace.age, pace.looks, pace.apart) == (1, 2, 1)
    pace.plain(steady=True)
    assert (pace.age, pace.looks) == (1, 1)
    for _ in range(APART):
        pace.plain(steady=True)
    assert (pace.age, pace.looks, pace.until) == (0, 0, 128)  # what plain steps take is known again
    for _ in range(APART):
        pace.plain(steady=True)
    assert pace.until == FIRST


def test_the_last_of_a_look_are_made_without_the_draft_model():
    pace = Pace(apart=0)
    pace.look(APART + 2, 512)
    bare = []
    while pace.looks:
        bare.append(pace.is_bare)
        pace.plain(steady=True)
    assert bare == [False] * APART + [True] * 2 and not pace.is_bare
    pace.enter(3)  # it keeps up again
    assert pace.looks == 3 and not pace.is_bare


def test_asking_goes_on_while_what_was_said_comes_true():
    pace = Pace(vain=CURIOUS)
    assert not pace.curious
    for right, curious in ((True, False), (True, True), (False, False), (True, False), (True, True)):
        pace.compared(right=right)
        assert pace.curious is curious
    pace.rested(10)
    pace.vain = CURIOUS
    assert not pace.curious


def test_excursions_fade():
    pace = Pace()
    pace.drafted()
    pace.excursions.returned()
    assert (pace.excursions.wide, pace.excursions.returns) == pytest.approx((FADING * (WIDE + 1), FADING * RETURNS + 1))
    assert pace.excursions.waiting == pytest.approx((FADING * RETURNS + 1) / (FADING * (WIDE + 1)))
    for _ in range(OLD):
        assert pace.excursions != Excursions()
        pace.plain(steady=True)
    assert pace.excursions == Excursions()


def test_rests_get_longer_until_drafts_gain():
    pace, lengths = Pace(), []
    for _ in range(5):
        pace.vain = CURIOUS
        assert not pace.curious
        pace.rested(10, missed=True, told=True)
        assert pace.curious and pace.missed and pace.told
        pace.asked(believed=False)
        assert pace.told
        lengths.append(pace.rest)
    assert lengths == [64, 128, 256, LONGEST, LONGEST]
    pace.asked(believed=True)
    assert not pace.told  # plain steps between those with drafts tell more
    pace.gained()
    assert pace.rest == SHORTEST


def test_nobody_is_put_off_for_ever():
    pace = Pace()
    assert [pace.puts_off(behind=True, may=True) for _ in range(PUT_OFF + 1)] == [True] * PUT_OFF + [False]
    assert not pace.puts_off(behind=True, may=False) and not pace.puts_off(behind=False, may=True) and pace.put_off == 0
