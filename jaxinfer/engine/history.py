"""How often drafts came true, so that it can be said what the next ones are worth. Plain Python.

Each kind of guess has a chance that its next token is right, from what happened lately to all requests; a request's own chance starts there
and follows its own drafts. With a chance a for each token, n drafts are worth a + a^2 + ... + a^n tokens. This file does not know what
a step costs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

WEIGHT = 4.0  # trials that a starting point counts for
MEMORY = 0.98  # what each trial leaves of the weight of those before
LEAST = 0.02  # a draft that stands more seldom is not worth its page


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

    def chance(self, key: Hashable, kind: str, start: float) -> float:
        """How likely a sequence's next draft of a kind stands: above 0 and below 1. start: what is thought of a kind never tried."""
        of_all = self.kinds.get(kind)
        start = start if of_all is None else of_all.chance(start)
        own = self.own.get(key)
        odds = None if own is None else own.get(kind)
        return start if odds is None else odds.chance(start)

    def forget(self, key: Hashable) -> None:
        """A sequence has ended."""
        self.own.pop(key, None)


def worth(chance: float, count: int) -> float:
    """Tokens that so many drafts are likely to give, if each that may stand does so with this chance, above 0 and below 1."""
    return chance * (1 - chance**count) / (1 - chance)


def enough(chance: float) -> int:
    """How many drafts are worth making: the last one stands in at least `LEAST` of the steps; never fewer than one."""
    return max(1, int(math.log(LEAST) / math.log(chance)))
