"""How often drafts came true, so that it can be said what the next ones are worth. Plain Python.

Each kind of guess has a chance that its next token is right, from what happened lately to all requests; a request's own chance starts there
and follows its own drafts. With a chance a for each token, n drafts are worth a + a^2 + ... + a^n tokens. This file does not know what
a step costs.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

START = 0.5  # the chance of a kind that was never tried
WEIGHT = 4.0  # trials that a starting point counts for
MEMORY = 0.97  # what each trial leaves of the weight of those before


@dataclass
class Odds:
    """Trials that count less the longer ago they were."""

    hits: float = 0.0
    trials: float = 0.0

    def take(self, accepted: int, proposed: int) -> None:
        """Add drafts of one step: trials end with the first that does not stand."""
        for place in range(min(accepted + 1, proposed)):
            self.hits = self.hits * MEMORY + (place < accepted)
            self.trials = self.trials * MEMORY + 1

    def chance(self, start: float) -> float:
        """How likely the next draft stands, between 0 and 1."""
        return (self.hits + WEIGHT * start) / (self.trials + WEIGHT)


@dataclass
class History:
    """Odds of each kind, and of each kind in each sequence that runs."""

    kinds: dict[str, Odds] = field(default_factory=dict)
    own: dict[Hashable, dict[str, Odds]] = field(default_factory=dict)

    def take(self, key: Hashable, kind: str, accepted: int, proposed: int) -> None:
        """Note what became of a sequence's drafts."""
        self.kinds.setdefault(kind, Odds()).take(accepted, proposed)
        self.own.setdefault(key, {}).setdefault(kind, Odds()).take(accepted, proposed)

    def worth(self, key: Hashable, kind: str, count: int) -> float:
        """Tokens that so many drafts of a kind are likely to give a sequence."""
        chance = self.own.get(key, {}).get(kind, Odds()).chance(self.kinds.get(kind, Odds()).chance(START))
        return sum(chance**place for place in range(1, count + 1))

    def forget(self, key: Hashable) -> None:
        """A sequence has ended."""
        self.own.pop(key, None)
