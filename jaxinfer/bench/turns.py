"""Times of two engines that did the same work turn by turn, on a machine that is noisy: their ratio, and how far it can be trusted.

The ratio is that of total times, not the median of the turns' ratios. It counts what falls into few turns, such as a trial of drafts, as
a user's clock does. And it leans to no side: hiccups only make runs longer, so the median of a mean of two runs lies above that of one run,
and the median of turns would favour what is run once by about 1 % where runs vary by 10 % (simulated; with 60 turns its interval then
misses the truth in a fifth of the cases, this one in a tenth). The price is a wider interval after a hiccup: more turns mend that.

The interval is the percentile bootstrap's over whole turns, so that what slowed a turn down slows both sides, with a fixed seed; one turn
less than there are is drawn, without which intervals of few turns are too narrow. This file does not know what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.9
FEW = 8  # turns: the interval of fewer says too little for a verdict
SEED = 0


class Ratio(NamedTuple):
    """Their total time by ours, above 1 where ours is faster; the interval of it, None for a single turn; and each turn's ratio."""

    value: float
    interval: tuple[float, float] | None
    turns: tuple[float, ...]

    def at_least(self, least: float) -> str:
        """Whether it is: "shown" if the whole interval is, "broken" if none of it is, otherwise, and after few turns, "not shown"."""
        if self.interval is None or len(self.turns) < FEW:
            return "not shown"
        low, high = self.interval
        return "shown" if low >= least else "broken" if high < least else "not shown"


def compare(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """The ratio of times, given for each turn."""
    pairs = np.array([theirs, ours], np.float64)
    total, count = pairs.sum(axis=1), pairs.shape[1]
    interval = None
    if count > 1:
        drawn = np.random.default_rng(SEED).integers(0, count, (RESAMPLES, count - 1))
        their, our = pairs[:, drawn].sum(axis=2)
        low, high = np.quantile(their / our, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        interval = (float(low), float(high))
    return Ratio(float(total[0] / total[1]), interval, tuple((pairs[0] / pairs[1]).tolist()))
