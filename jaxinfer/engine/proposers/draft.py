"""The draft model as a proposer: it thinks on the device (`step/propose.py`), the host only says for whom. Plain Python."""

from __future__ import annotations

from typing import ClassVar

from jaxinfer.batch import DRAFTED
from jaxinfer.engine.proposers.proposal import Proposal
from jaxinfer.engine.sequence import Key, Sequence


class DraftProposer:
    """Always has an idea, never sees it."""

    DEVICE: ClassVar[bool] = True
    HOPED: ClassVar[float] = 0.8  # only trials tell what it is worth, so a few are made: what is hoped for counts for four

    def rest(self) -> bool:
        """Nothing is read."""
        return False

    def propose(self, sequence: Sequence, count: int) -> Proposal | None:
        """Places for `count` drafts."""
        return Proposal((DRAFTED,) * count, "draft")

    def forget(self, key: Key) -> None:
        """Nothing is kept."""
