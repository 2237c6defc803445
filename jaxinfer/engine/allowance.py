"""What drafts may cost where it is not certain that they pay: little, whatever was believed about them. Plain Python.

Each number of rows has an account, in plain steps of that size. Every step without drafts earns a small share of one, saved up for
trials; a step with drafts is charged what it took beyond what its tokens cost without. So even where every belief is wrong the loss is
that share of the time, and `start` - `LEAST` steps once. Gains fill the account up to `start` alone: a good hour pays for no bad one.
This file does not know why a step has drafts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SHARE = 0.01
START = 2.0
MOST = 16.0  # what is saved up for a dear trial
LEAST = -2.0  # below it drafts are made only if they can be paid, whatever they promise


@dataclass
class Allowance:
    """Accounts by size. share: what a step earns. start: what an account begins with. most: what is saved up at most."""

    share: float = SHARE
    start: float = START
    most: float = MOST
    _balance: dict[int, float] = field(default_factory=dict)

    def balance(self, size: int) -> float:
        """Plain steps that drafts may cost."""
        return self._balance.get(size, self.start)

    def earn(self, size: int) -> None:
        """A step without drafts was made."""
        self._balance[size] = min(self.balance(size) + self.share, self.most)

    def settle(self, size: int, gain: float) -> None:
        """A step with drafts has brought so many plain steps more than it cost; below 0 it cost more."""
        balance = self.balance(size)
        self._balance[size] = balance + (gain if gain < 0 else max(0.0, min(gain, self.start - balance)))

    def believes(self, size: int) -> bool:
        """Whether what drafts promise is reason enough to make some."""
        return self.balance(size) > LEAST

    def affords(self, size: int, price: float) -> bool:
        """Whether a trial that costs so many plain steps, if no draft stands, can be paid from what was saved up since the start."""
        return self.balance(size) >= self.start + price
