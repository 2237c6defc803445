"""What drafts may cost where it is not certain that they pay: little, whatever was believed about them. Plain Python.

Each number of rows has an account, in plain steps of that size. Every step without drafts earns a small share of one, saved up for trials;
a step with drafts, and plain ones close behind it, are charged what they took beyond what their tokens cost without, by the clock. A
machine that gets slower or faster is no fault of drafts: what a plain step takes is known a few steps later, so each waits that long, and
the dearer of what plain steps were thought to take then and are known to take now counts. So even where every belief about drafts is wrong
the loss is that share of the time, and `START` - `DEEPEST` steps once; what plain steps take has to be right (`costs.py`). Gains fill the
account up to `GAINED` alone: a good hour pays for no bad one. But what it costs to look what plain steps take may be as much as that, where
those close behind drafts are slow; so it is no reason to stop where drafts have gained more since the last look.
This file does not know why a step has drafts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

SHARE = 0.003
START = 2.0
GAINED = 12.0
MOST = 16.0  # what is saved up for a dear trial, and what is gained at most before it is settled
LATE = 6  # steps with drafts after which it is known what plain ones take
DEEPEST = -4.0  # no lower by what was open: a machine that has become faster meanwhile is no fault of drafts either
LEAST = -2.0  # below it drafts are made only if they can be paid, whatever they promise


class Step(NamedTuple):
    """One with drafts and the plain ones close behind it: how long they took, the tokens of a row that they brought, and what a plain step
    was thought to take then."""

    seconds: float
    tokens: float
    plain: float

    def gain(self, plain: float) -> float:
        """Tokens beyond those of plain steps, in plain steps."""
        return self.tokens - self.seconds / max(self.plain, plain)


@dataclass
class Unsettled:
    """Steps that are not charged yet. gain: of those whose price is known, in plain steps, `MOST` at most; whole: without that limit;
    latest: the others; floor: below which the account does not fall meanwhile."""

    gain: float = 0.0
    whole: float = 0.0
    latest: deque[Step] = field(default_factory=deque)
    floor: float = -math.inf


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
        gain = self._gain(size)
        left = settled + (max(gain, min(0.0, DEEPEST - settled)) if gain < 0 else max(0.0, min(gain, GAINED - settled)))
        return max(left, self._open[size].floor)

    def earn(self, size: int, steps: int = 1) -> None:
        """So many steps without drafts were made."""
        self._settled[size] = min(self._settled.get(size, self.start) + self.share * steps, self.most)

    def owe(self, size: int, seconds: float, tokens: float, *, near: bool = False) -> None:
        """A step because of drafts took so long, and brought so many tokens for each of its rows. near: a plain one close
        behind another."""
        found, plain = self._open.setdefault(size, Unsettled()), self.plain(size)
        if near and found.latest:
            last = found.latest[-1]
            found.latest[-1] = last._replace(seconds=last.seconds + seconds, tokens=last.tokens + tokens)
            return
        found.latest.append(Step(seconds, tokens, plain))
        if len(found.latest) > LATE:
            gain = found.latest.popleft().gain(plain)
            found.gain, found.whole = min(found.gain + gain, MOST), found.whole + gain

    def look(self, size: int) -> None:
        """Plain steps come next because drafts pay: what these cost does not lower the account below what it began with."""
        if size in self._open:
            self._open[size].floor = min(self.balance(size), self.start)

    def settle(self, size: int) -> float:
        """Charge what is open; how many plain steps it has gained, none if it cost some."""
        if size not in self._open:
            return 0.0
        if self._open[size].whole + self._latest(size) <= 0:
            self._open[size].floor = -math.inf  # what the look cost was not gained before
        gain, self._settled[size] = self._gain(size), self.balance(size)
        del self._open[size]
        return max(0.0, gain)

    def _gain(self, size: int) -> float:
        return min(self._open[size].gain + self._latest(size), MOST)

    def _latest(self, size: int) -> float:
        plain = self.plain(size)
        return sum(step.gain(plain) for step in self._open[size].latest)

    def charge(self, size: int, price: float) -> None:
        """Charge so many plain steps besides; below 0 they are paid in. What is gained meanwhile pays first."""
        found = self._open.get(size)
        if found is not None and price > 0:
            found.gain, found.whole = found.gain - price, found.whole - price
        else:
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
