"""What steps cost: looked up by rows, corrected by what they take."""

import pytest

from jaxinfer.batch import DRAFTED, Batch, Row
from jaxinfer.engine.costs import (
    ALONE,
    FOLLOWED,
    HELD_UP,
    KEPT,
    KNOWN,
    OLD,
    PLAIN,
    PLAINS,
    RECENT,
    START,
    TURNS,
    Costs,
    Way,
    way_of,
)
from jaxinfer.request import Request
from jaxinfer.step.buckets import Bucket

WIDE, MODEL = Way(3), Way(3, hidden=True)


@pytest.fixture
def costs():
    costs = Costs()
    for way, rows, seconds in ((PLAIN, 1, 1.0), (PLAIN, 2, 1.5), (PLAIN, 4, 2.0), (WIDE, 1, 2.0), (WIDE, 4, 3.0), (MODEL, 4, 4.0)):
        costs.set(way, rows, seconds)
    return costs


def test_the_smallest_program_that_holds_the_rows_counts(costs):
    assert [costs.size(PLAIN, rows) for rows in (1, 2, 3, 4)] == [1, 2, 4, 4]
    assert [costs.ratio(WIDE, rows) for rows in (1, 2, 3, 4)] == [2.0, 2.0, 1.5, 1.5]
    assert costs.ways == [WIDE, MODEL]
    assert [str(way) for way in (PLAIN, *costs.ways)] == ["plain", "host x3", "model x3"]
    with pytest.raises(LookupError, match="was measured"):
        costs.ratio(WIDE, 5)


def plain(costs, rows=1, seconds=1.0, count=PLAINS + 1):
    """So many plain steps far from drafts were made."""
    for _ in range(count):
        costs.take(PLAIN, rows, seconds, far=True)


def test_steps_are_compared_with_plain_ones_far_from_drafts(costs):
    for slow in (1.0, 5.0, 0.3):
        plain(costs, seconds=slow)
        for _ in range(KEPT + 1):
            costs.take(WIDE, 1, 1.2 * slow)
        assert costs.ratio(WIDE, 1) == pytest.approx(1.2)
    for _ in range(PLAINS):
        assert costs.take(PLAIN, 1, 9.0) == 9.0  # close behind drafts: it is charged, and says nothing
    assert costs.seconds(1) == pytest.approx(0.3) and costs.ratio(WIDE, 1) == pytest.approx(1.2)
    costs.rested(1, 3.0)
    assert costs.seconds(1) == 3.0


def test_steps_with_drafts_tell_what_plain_ones_take_until_these_are_far_again(costs):
    plain(costs)
    costs.take(WIDE, 1, 90.0)  # the first touches everything for the first time
    for _ in range(2 * TURNS):
        costs.take(WIDE, 1, 1.2)
    for _ in range(TURNS // 2 + 1):
        assert costs.seconds(1) == pytest.approx(1.0)
        costs.take(WIDE, 1, 2.4)  # all is slower
    assert costs.seconds(1) == pytest.approx(2.0)
    for _ in range(TURNS):
        costs.take(WIDE, 1, 0.6)
    assert costs.seconds(1) == pytest.approx(0.5)
    plain(costs, seconds=0.4, count=PLAINS)
    assert costs.seconds(1) == pytest.approx(0.4)
    for _ in range(2 * TURNS):
        costs.take(WIDE, 1, 0.6)  # since they were far: what came before does not count
    assert costs.seconds(1) == pytest.approx(0.4)


def test_drafts_right_behind_plain_steps_do_not_tell_what_these_take(costs):
    plain(costs)
    for _ in range(2 * TURNS + 1):
        costs.take(WIDE, 1, 1.2)
    for _ in range(TURNS):
        costs.take(WIDE, 1, 5.0, far=True)
    assert costs.turned(1) == 1.0


def test_each_width_is_held_beside_itself(costs):
    costs.set(Way(2), 1, 1.5)
    plain(costs)
    for _ in range(2 * TURNS + 1):
        costs.take(WIDE, 1, 1.2)
        costs.take(Way(2), 1, 5.0)
    assert costs.turned(1) == 1.0


def test_what_one_look_brings_is_all_that_counts(costs):
    plain(costs)
    for _ in range(TURNS + 1):
        costs.take(WIDE, 1, 1.2)
    for _ in range(TURNS):
        costs.take(WIDE, 1, 2.4)
    plain(costs, seconds=2.0, count=PLAINS)
    assert costs.seconds(1) == pytest.approx(2.0)


def test_the_first_step_of_a_kind_is_charged_as_at_the_start_and_says_nothing(costs):
    assert costs.take(PLAIN, 1, 5.0) == 1.0 and costs.take(WIDE, 1, 50.0) == 2.0 and costs.take(WIDE, 1, 0.5) == 0.5
    assert costs.ratio(WIDE, 1) == pytest.approx((0.5 + 2 * 2.0) / 3) and costs.take(WIDE, 2, 9.0) == 2.0 * 1.5


def test_no_step_with_drafts_is_thought_to_take_less_than_a_plain_one(costs):
    plain(costs)
    for _ in range(KEPT + 1):
        costs.take(WIDE, 1, 0.5)
    assert costs.ratio(WIDE, 1) == 1.0
    costs.set(Way(2), 1, 0.5)
    costs.set(FOLLOWED, 1, 0.5)
    assert costs.ratio(Way(2), 1) == costs.ratio(FOLLOWED, 1) == 1.0  # at the start


def test_a_step_that_took_no_time_says_nothing_of_the_machine(costs):
    plain(costs)
    for _ in range(3 * TURNS):
        costs.take(WIDE, 1, 0.0)
    assert costs.seconds(1) == 1.0


def test_a_way_that_takes_long_now_and_then_is_dear_but_no_step_counts_for_everything(costs):
    plain(costs)
    for number in range(15 * KEPT):
        costs.take(WIDE, 1, 2.0 if number % 5 == 0 else 1.0)
    assert costs.ratio(WIDE, 1) == pytest.approx(1.2)
    for number in range(15 * KEPT):
        costs.take(WIDE, 1, 1000.0 if number % 5 == 0 else 1.0)
    assert costs.ratio(WIDE, 1) == pytest.approx(0.8 + 0.2 * HELD_UP)
    for number in range(4 * PLAINS):
        costs.take(PLAIN, 1, 1000.0 if number % 3 == 0 else 1.0, far=True)
    assert costs.seconds(1) == pytest.approx((2.0 + HELD_UP) / 3)


def test_what_was_measured_at_the_start_is_forgotten(costs):
    costs.take(PLAIN, 3, 1.0)
    costs.take(WIDE, 3, 3.0)
    for number in range(START + 6):
        costs.take(PLAIN, 3, 1.0, far=True)
        costs.take(WIDE, 3, 3.0, far=True)
        assert (costs.ratio(WIDE, 4) == 3.0) == (number >= START)


def test_a_start_that_had_it_wrong_by_far_is_forgotten_too(costs):
    plain(costs)
    for _ in range(START + 2):
        costs.take(WIDE, 1, 2.1 * HELD_UP)  # 2 at the start
    assert costs.ratio(WIDE, 1) == pytest.approx(2.1 * HELD_UP)


def test_after_a_few_plain_steps_it_is_known_what_one_takes(costs):
    costs.take(PLAIN, 3, 9.0)
    for _ in range(KNOWN):
        assert not costs.known(3) and costs.seconds(3) == (3.0 if costs._plains else 2.0)
        costs.take(PLAIN, 3, 3.0)
    assert costs.known(4) and not costs.known(1)


def test_what_it_takes_that_a_draft_model_keeps_up_is_seen_beside_plain_steps_and_not_forgotten(costs):
    costs.set(FOLLOWED, 1, 1.0)
    plain(costs, seconds=2.0)
    costs.take(FOLLOWED, 1, 9.0)
    for _ in range(KEPT):
        costs.take(PLAIN, 1, 2.0, far=True)
        costs.take(FOLLOWED, 1, 2.6, far=True)
    assert costs.more(FOLLOWED, 1) == pytest.approx(0.3)
    for number in range(2 * OLD):
        costs.take(FOLLOWED, 1, 2.6 if number < RECENT else 5.2, far=True)
    assert costs.more(FOLLOWED, 1) == pytest.approx(0.3) and costs.seconds(1) == pytest.approx(4.0)


def test_a_plain_step_alone_waits(costs):
    assert costs.more(ALONE, 1) == 0.0  # never measured
    costs.set(ALONE, 1, 1.5)
    costs.set(ALONE, 4, 1.0)
    assert [costs.more(ALONE, rows) for rows in (1, 4)] == [0.5, 0.0]
    assert costs.ways == [WIDE, MODEL] and str(ALONE) == "plain alone"


def test_plain_steps_that_a_draft_model_has_seen_show_what_those_without_it_take(costs):
    costs.set(FOLLOWED, 1, 1.25)
    assert costs.more(FOLLOWED, 1) == 0.25 and costs.seconds(1) == 1.0 and str(FOLLOWED) == "plain followed"
    for _ in range(KEPT + 1):
        costs.take(FOLLOWED, 1, 2.5, far=True)
    for _ in range(KEPT + 1):
        costs.take(WIDE, 1, 3.0)
    assert costs.seconds(1) == 2.0 and costs.ratio(WIDE, 1) == 1.5 and costs.more(FOLLOWED, 1) == 0.25


def test_a_batch_says_how_it_is_run():
    def way(*drafts, followed=False):
        batch = Batch((Row(Request("a", (1,)), 0, 0, (1, *drafts), (1,), samples=True),), ())
        return way_of(batch, Bucket(0, 0, 1, 3 if drafts else 1), followed=followed)

    assert [way(), way(followed=True), way(5, followed=True), way(5, DRAFTED)] == [PLAIN, FOLLOWED, WIDE, MODEL]


def test_numbers_of_rows_that_one_program_runs():
    costs = Costs()
    for rows in (1, 2, 4, 6):
        costs.set(PLAIN, rows, 1.0)
    assert [costs.span(rows, 1) for rows in (1, 3, 4, 5)] == [(1, 1), (3, 4), (3, 4), (5, 6)]
    assert costs.span(3, 2) == (5, 8)
