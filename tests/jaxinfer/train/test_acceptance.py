"""A draft stands where the target's own token is drawn: as in serving, noise and all."""

import numpy as np
import pytest

from jaxinfer.prompts import Document
from jaxinfer.train import acceptance, answers
from jaxinfer.train.acceptance import Examiner
from jaxinfer.train.answers import Wanted
from jaxinfer.train.rows import Text
from tests.jaxinfer.train.conftest import enrol


class Open:
    """An engine as `LLM` gives out what it made."""

    def __init__(self, engine):
        self.engine = engine

    def complete(self, requests):
        from jaxinfer.api import LLM

        llm = LLM.__new__(LLM)
        llm._enter(self.engine)
        return llm.complete(requests)


def test_the_model_as_its_own_draft_has_nearly_all_drafts_stand(plain, target, small):
    """Its texts come from the engine, its draws from whole texts: seeds and positions mean the same in both."""
    documents = [Document(line, "", None, (5 * line, 7, line), (), 61) for line in range(1, 5)]
    requests = answers.requests_of("learn", documents, Wanted(max_tokens=16), (0.0, 0.9))
    texts = answers.answers(Open(plain), requests, lambda *_: None)
    own = enrol(target, target)
    greedy, warm = Examiner(own.learner).measure(own.leaves, own.learner.student.begin(), texts)
    assert (greedy.temperature, warm.temperature) == (0.0, 0.9) and min(greedy.agreement, warm.agreement) > 0.97
    assert greedy.tokens > 4.8 and warm.places > 30 and len({text.tokens for text in texts}) == 8
    other = [text._replace(seed=text.seed + 1) for text in texts if text.temperature]
    assert Examiner(own.learner).measure(own.leaves, own.learner.student.begin(), other)[0].agreement < 0.7


def test_drafts_stand_in_a_row():
    text = Text((9, 9, 1, 2, 3, 4, 5, 6), 2)
    drawn = np.array([[0, 1, 2, 3, 0, 5, 6, 0]])
    found = acceptance._hits(drawn, text)
    assert found.tolist() == [
        [True, True, True, False], [True, True, False, True], [True, False, True, True],
        [False, True, True, False], [True, True, False, False], [True, False, False, False],
    ]  # fmt: skip
    figures = acceptance._acceptance(0.0, [found])
    assert figures.stand == pytest.approx((1.0, 2 / 3, 1 / 3, 0)) and figures.places == 3 and figures.tokens == pytest.approx(3.0)
    assert figures.agreement == pytest.approx(5 / 6) and figures.tokens_compared == 6


def test_a_student_with_depth_is_asked_ahead_of_the_place():
    text = Text((9, 1, 2, 3, 4, 5, 6), 1)
    ahead = np.array([[1, 2, 3, 4, 5, 6, 0], [2, 0, 4, 5, 6, 0, 0]])
    found = acceptance._hits(ahead, text)
    assert found[:3].tolist() == [[True, True, False, True], [True, False, True, True], [True, True, True, True]]


def test_short_answers_count_for_single_drafts_alone():
    figures = acceptance._acceptance(0.0, [np.ones((2, 4), bool)])
    assert (figures.agreement, figures.places, figures.stand) == (1.0, 0, (0.0,) * 4)
