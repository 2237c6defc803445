"""What drafts may cost where it is not certain that they pay: little, whatever was believed about them. Plain Python.

Each number of rows has an account, in plain steps of that size. Every step without drafts earns a small share of one, saved up for
trials; a step with drafts is charged what it took beyond what its tokens cost without, by the clock, as soon as plain steps around it have
shown what these take: a machine that gets slower is no fault of drafts. So even where every belief is wrong the loss is
that share of the time, and `start` - `DEEPEST` steps once. Gains fill the account up to `GAINED` alone: a good hour pays for no bad one.
This file does not know why a step has drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

SHARE = 0.003
START = 2.0
GAINED = 6.0
MOST = 16.0  # what is saved up for a dear trial
DEEPEST = -4.0  # no lower by what was open: a machine that has become faster meanwhile is no fault of drafts either
LEAST = -2.0  # below it drafts are made only if they can be paid, whatever they promise


@dataclass
class Unsettled:
    """Steps that are not charged yet: how long they took, and the tokens of a row that they brought."""

    seconds: float = 0.0
    tokens: float = 0.0


@dataclass
class Allowance:
    """Accounts by size. share: what a step earns. start: what an account begins with. most: what is saved up at most. plain: the seconds of
    a plain step of a size at present."""

    share: float = SHARE
    start: float = START
    most: float = MOST
    plain: Callable[[int], float] = lambda size: 1.0
    _settled: dict[int, float] = field(default_factory=dict)
    _open: dict[int, Unsettled] = field(default_factory=dict)

    def balance(self, size: int) -> float:
        """Plain steps that drafts may cost, if what is not settled yet is measured by plain steps of now."""
        settled = self._settled.get(size, self.start)
        if size not in self._open:
            return settled
        gain = self._open[size].tokens - self._open[size].seconds / self.plain(size)
        return settled + (max(gain, min(0.0, DEEPEST - settled)) if gain < 0 else max(0.0, min(gain, GAINED - settled)))

    def earn(self, size: int, steps: int = 1) -> None:
        """So many steps without drafts were made."""
        self._settled[size] = min(self._settled.get(size, self.start) + self.share * steps, self.most)

    def owe(self, size: int, seconds: float, tokens: float) -> None:
        """A step because of drafts took so long, and brought so many tokens for each of its rows."""
        found = self._open.setdefault(size, Unsettled())
        found.seconds += seconds
        found.tokens += tokens

    def settle(self, size: int) -> float:
        """Charge what is open; how many plain steps it has gained, none if it cost some."""
        if size not in self._open:
            return 0.0
        self._settled[size], found = self.balance(size), self._open.pop(size)
        return max(0.0, found.tokens - found.seconds / self.plain(size))

    def charge(self, size: int, price: float) -> None:
        """Charge so many plain steps besides; below 0 they are paid in."""
        self._settled[size] = min(self._settled.get(size, self.start) - price, self.most)

    def doubts(self, size: int) -> bool:
        """Whether there is nothing left by what is still open, so that plain steps should show first what they take now."""
        return size in self._open and not self.believes(size)

    def believes(self, size: int) -> bool:
        """Whether what drafts promise is reason enough to make some."""
        return self.balance(size) > LEAST

    def affords(self, size: int, price: float) -> bool:
        """Whether a trial that costs so many plain steps, if no draft stands, can be paid from what was saved up since the start."""
        return self.balance(size) >= self.start + price
