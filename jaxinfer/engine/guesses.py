"""What proposers say of a step's sequences, and a step that is made of it. Plain Python: it knows no costs and decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jaxinfer.batch import DRAFTED
from jaxinfer.engine.costs import Way
from jaxinfer.engine.history import worth
from jaxinfer.engine.proposers.proposal import Proposal
from jaxinfer.engine.sequence import Key
from jaxinfer.engine.sequence import Sequence as Running


class Candidate(NamedTuple):
    """A sequence that decodes in the next step. hidden: whether drafts may be such that the host does not know them."""

    sequence: Running
    hidden: bool = True


class Guess(NamedTuple):
    """A proposal and the chance that each of its drafts stands. likely: that the text goes on such that it can be used at all."""

    proposal: Proposal
    chance: float
    likely: float = 1.0

    def worth(self, count: int) -> float:
        """Tokens that its first `count` drafts are likely to give."""
        return self.likely * worth(self.chance, min(count, len(self.proposal.tokens)))

    @property
    def hidden(self) -> bool:
        """Whether the host does not know its drafts."""
        return self.proposal.tokens[0] == DRAFTED


class Plan(NamedTuple):
    """A step with drafts: how it is run, for whom, how many tokens a row is likely to get, and what it costs in plain steps."""

    way: Way
    guesses: Mapping[Key, Guess]
    tokens: float
    cost: float

    @property
    def promise(self) -> float:
        """Tokens per second, those of a plain step being 1."""
        return self.tokens / self.cost
