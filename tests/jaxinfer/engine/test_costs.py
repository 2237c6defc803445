"""What steps cost: looked up by rows, corrected by what they take, measured on a real engine."""

import pytest

from jaxinfer.engine.costs import MODEL, PLAIN, WIDE, Costs, measure


def test_the_smallest_program_that_holds_the_rows_counts():
    costs = Costs()
    costs.set(PLAIN, 1, 1.0)
    costs.set(PLAIN, 4, 2.0)
    assert [costs.get(PLAIN, rows) for rows in (1, 2, 4)] == [1.0, 2.0, 2.0]
    for way, rows in ((PLAIN, 5), (WIDE, 1)):
        with pytest.raises(LookupError, match="was measured"):
            costs.get(way, rows)


def test_steps_correct_what_was_measured_and_outliers_do_little():
    costs = Costs()
    costs.take(WIDE, 1, 2.0)
    assert costs.get(WIDE, 1) == 2.0
    costs.take(WIDE, 1, 3.0)
    assert costs.get(WIDE, 1) == pytest.approx(2.5)
    costs.take(WIDE, 1, 1000.0)
    assert costs.get(WIDE, 1) < 3.4
    for _ in range(100):
        costs.take(WIDE, 1, 1.0)
    assert costs.get(WIDE, 1) == pytest.approx(1.0, rel=0.01)


def test_the_first_step_counts_for_more_than_what_was_measured_before():
    costs = Costs()
    costs.set(WIDE, 4, 9.0)
    assert not costs.seen(WIDE, 2)
    costs.take(WIDE, 4, 2.0)
    assert costs.seen(WIDE, 2) and costs.get(WIDE, 2) == 2.0


def test_every_way_is_measured_for_all_rows(speculating):
    costs = measure(speculating.program)
    assert all(costs.get(way, rows) > 0 for way in (PLAIN, WIDE, MODEL) for rows in (1, 2, 4))
