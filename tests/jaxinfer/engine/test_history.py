"""How often drafts came true, and what the next are worth."""

import pytest

from jaxinfer.engine.history import START, History, Odds


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
    for _ in range(40):
        odds.take(3, 3)
    assert odds.chance(START) > 0.9


def test_a_request_starts_from_its_kind_and_goes_its_own_way():
    history = History()
    assert history.worth("a", "draft", 2) == pytest.approx(START + START**2)
    for _ in range(50):
        history.take("a", "draft", 3, 3)
        history.take("b", "lookup", 0, 3)
    assert history.worth("new", "draft", 3) > 2.5 > 0.4 > history.worth("new", "lookup", 3)
    for _ in range(30):
        history.take("c", "draft", 0, 3)
    assert history.worth("c", "draft", 3) < history.worth("new", "draft", 3) < history.worth("a", "draft", 3)
    history.forget("a")
    assert history.worth("a", "draft", 3) == history.worth("new", "draft", 3)
