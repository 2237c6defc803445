"""What is known of each sequence that may get drafts: what was said about it, and how much of it a draft model has missed. Plain Python.

This file does not know what drafts are worth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Values
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxinfer.batch import Batch
from jaxinfer.engine.proposers.proposal import Proposal
from jaxinfer.engine.sequence import Key

UNSEEN = 16  # tokens of a sequence that a draft model may have missed; each costs 0.5 to 1 % of the drafts that stand


class Thought(NamedTuple):
    """What was said about a text of so many tokens, and not used."""

    length: int
    proposal: Proposal


@dataclass
class Sequences:
    """kinds: of the drafts that a sequence was given last. thoughts: of it that were not used. How many of its tokens the draft model has
    not seen: those in steps with prompts (`unseen`), and one for each step without that it was left out of (`missed`) since the sequence
    began (`began`)."""

    kinds: dict[Key, str] = field(default_factory=dict)
    thoughts: dict[Key, Thought] = field(default_factory=dict)
    unseen: Counter[Key] = field(default_factory=Counter)
    missed: int = 0
    began: dict[Key, int] = field(default_factory=dict)

    def use(self, keys: Iterable[Key]) -> None:
        """What was said about these is used."""
        for key in keys:
            self.thoughts.pop(key, None)

    def begin(self, batch: Batch) -> None:
        """Sequences that enter a slot begin, or begin again: what they hold is computed anew."""
        for admission in batch.admissions:
            key = admission.request.key
            self.began[key] = self.missed
            self.unseen.pop(key, None)

    def miss(self, batch: Batch) -> None:
        """The draft model is left out of a step."""
        if not batch.prefills:
            self.missed += 1
            return
        for row in batch.rows:
            self.unseen[row.request.key] += len(row.tokens)

    def lose(self) -> None:
        """The draft model has not seen what came of any sequence that there is."""
        self.missed += UNSEEN + 1

    def lost(self, key: Key) -> bool:
        """Whether the draft model has lost sight of a sequence: it drafts worse for each token that it has not seen."""
        return self.gone(key) > UNSEEN

    def gone(self, key: Key) -> int:
        """How many tokens of a sequence the draft model has not seen."""
        return self.unseen[key] + self.missed - self.began.setdefault(key, self.missed)

    def forget(self, key: Key) -> None:
        """A sequence has ended."""
        for about in (self.thoughts, self.unseen, self.began):
            about.pop(key, None)


def common(came: Values[int], said: Values[int]) -> int:
    """How many of the first tokens are the same."""
    return next((place for place, (one, other) in enumerate(zip(came, said, strict=False)) if one != other), len(came))
