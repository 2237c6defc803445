"""The draft model as a proposer: places for drafts, whatever the text."""

from jaxinfer.batch import DRAFTED
from jaxinfer.engine.proposers.draft import DraftProposer
from jaxinfer.engine.proposers.proposal import Proposer
from jaxinfer.engine.scheduler import Limits
from jaxinfer.request import Request
from tests.jaxinfer.conftest import scheduler


def test_it_promises_drafts_that_the_host_does_not_know():
    proposer, sequence = DraftProposer(), scheduler(Limits(1, 8, 1), 9).add(Request("a", (1, 2)))
    assert isinstance(proposer, Proposer) and proposer.DEVICE
    assert proposer.propose(sequence, 3) == ((DRAFTED,) * 3, "draft")
    proposer.forget(sequence.request.key)
    proposer.rest()
    assert proposer.propose(sequence, 1) == ((DRAFTED,), "draft")
