"""Drafts that are no token ids end the drafts."""

from jaxinfer.engine.proposers.lookup import LookupProposer
from jaxinfer.engine.proposers.proposal import Proposer, checked


def test_drafts_end_before_a_foreign_id():
    assert checked((0, 9, 3), 10) == (0, 9, 3)
    assert checked((0, 10, 3), 10) == (0,)
    assert checked((-2, 1), 10) == () == checked((), 10)


def test_what_a_proposer_is():
    assert isinstance(LookupProposer(), Proposer)
    assert not isinstance(object(), Proposer)
