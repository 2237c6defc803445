"""Plain steps at which nobody looks, where drafts do not pay. Plain Python.

In steps of a millisecond nothing is in the processor's cache any more, and whatever is done once takes long: so an engine only notes when
each of them ended. This file does not know when to rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

RESTING = 32  # steps at most


@dataclass
class Rest:
    """Steps of so many rows, one behind another. left: how many more may be launched. ends: when the step before ended and each of them, in
    seconds. over: what ends now is to be told as usual."""

    rows: int
    left: int = RESTING
    ends: list[float] = field(default_factory=list)
    over: bool = False

    @property
    def launched(self) -> int:
        """How many of them were."""
        return RESTING - self.left

    def finish(self) -> list[float]:
        """What the steps took."""
        self.over = True
        return [end - begin for begin, end in pairwise(self.ends)]
