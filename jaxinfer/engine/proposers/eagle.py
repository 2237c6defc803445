"""An EAGLE-3 head as a proposer: like the draft model it thinks on the device, from what the model itself has computed. Plain Python."""

from __future__ import annotations

from jaxinfer.batch import DRAFTED
from jaxinfer.engine.proposers.draft import DraftProposer
from jaxinfer.engine.proposers.proposal import Proposal
from jaxinfer.engine.sequence import Sequence


class EagleProposer(DraftProposer):
    """Always has an idea, never sees it."""

    def propose(self, sequence: Sequence, count: int) -> Proposal | None:
        """Places for `count` drafts."""
        return Proposal((DRAFTED,) * count, "eagle")
