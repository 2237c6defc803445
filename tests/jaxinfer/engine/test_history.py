"""How often drafts came true, and what the next are worth."""

import pytest

from jaxinfer.engine.history import History, Odds, enough, worth

START = 0.5


def test_trials_end_with_the_first_draft_that_does_not_stand():
    odds = Odds()
    odds.take(2, 4)
    assert (round(odds.hits), round(odds.trials)) == (2, 3)
    odds = Odds()
    odds.take(4, 4)
    assert (round(odds.hits), round(odds.trials)) == (4, 4)


def test_what_happened_lately_counts():
    odds = Odds()
    for _ in range(100):
        odds.take(0, 3)
    assert odds.chance(START) < 0.1
    for _ in range(50):
        odds.take(3, 3)
    assert odds.chance(START) > 0.9


def test_a_request_starts_from_its_kind_and_goes_its_own_way():
    history = History()
    assert [history.chance("a", "draft", start) for start in (START, 0.8)] == [START, 0.8]
    for _ in range(50):
        history.take("a", "draft", 3, 3)
        history.take("b", "lookup", 0, 3)
    assert history.chance("new", "draft", START) > 0.9 > 0.2 > history.chance("new", "lookup", START)
    for _ in range(30):
        history.take("c", "draft", 0, 3)
    assert history.chance("c", "draft", START) < history.chance("new", "draft", START) < history.chance("a", "draft", START)
    history.forget("a")
    assert history.chance("a", "draft", START) == history.chance("new", "draft", START)


def test_what_drafts_are_worth_and_how_many_are_enough():
    assert worth(0.5, 3) == pytest.approx(0.5 + 0.25 + 0.125)
    assert [enough(chance) for chance in (0.001, 0.1, 0.2, 0.5)] == [1, 1, 2, 5]
    assert enough(0.999) > 100
