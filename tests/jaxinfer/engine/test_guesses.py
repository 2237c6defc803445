"""What a guess is worth, and what a step promises."""

import pytest

from jaxinfer.batch import DRAFTED
from jaxinfer.engine.costs import Way
from jaxinfer.engine.guesses import Guess, Plan
from jaxinfer.engine.proposers.proposal import Proposal


def test_a_guess_is_worth_what_of_it_is_likely_to_stand():
    guess = Guess(Proposal((7, 8, 9), "some"), 0.5)
    assert [guess.worth(count) for count in (0, 1, 2, 3, 9)] == pytest.approx([0, 0.5, 0.75, 0.875, 0.875])
    assert guess._replace(likely=0.5).worth(2) == pytest.approx(0.375)
    assert not guess.hidden and Guess(Proposal((DRAFTED,), "some"), 0.5).hidden


def test_a_step_promises_tokens_for_what_it_costs():
    assert Plan(Way(4), {}, tokens=3.0, cost=1.5).promise == 2.0
