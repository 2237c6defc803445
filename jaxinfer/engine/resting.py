"""Steps at which nobody looks, where drafts do not pay. Plain Python.

In steps of a millisecond nothing is in the processor's cache any more, and whatever is done once takes long: so for a while an engine does
nothing for drafts at all, and the longer they have not paid, the longer (`pace.py`). What it looks at then is one object. Every few steps
that one looks at the clock: what plain steps take far from drafts and prompts is seen nowhere else, as those close behind take longer. This
file does not know when to rest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from jaxinfer.batch import Batch

SHORTEST, LONGEST = 32, 512  # steps
TIMED = 8  # steps between two looks at the clock
LOOKS, ENOUGH = 5, 3  # such stretches that are remembered, the latest; so many tell what a step takes
STALE = 64  # steps after which they do not
LATE = 2  # times as many for one that waits for prompts


class Span(NamedTuple):
    """Numbers of rows, both included, that one program runs."""

    least: int
    most: int


@dataclass(slots=True)
class Rest:
    """So many steps of so many rows, one behind another, with prompts between them or not. size: see `Speculator`. prompts_after: it
    ends with the first prompts that come behind so many steps, for a draft model has to see a sequence from its beginning, or after
    `LATE` times as many as it has; None: there is no draft model. launched: so far; mixed: of these, those with prompts. behind: whether
    the last one had some. due: it ends now, whatever comes; over: what ends now is to be told as usual. mark: when the latest look at the
    clock was; looks: what a step took between two, and at which step."""

    size: int
    rows: Span
    steps: int = SHORTEST
    prompts_after: int | None = None
    launched: int = 0
    mixed: int = 0
    behind: bool = False
    due: bool = False
    over: bool = False
    clock: Callable[[], float] = time.perf_counter
    mark: float = 0.0
    looks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=LOOKS))
    _begun: int = 0  # the step behind the last one with prompts or with a sequence that enters, before which nothing may have run
    _last: int = 0  # rows of the last step
    _calm: int = 0  # the step before which nothing is to be looked at, if all are like the last one

    @property
    def plain(self) -> int:
        """Steps without prompts."""
        return self.launched - self.mixed

    @property
    def seconds(self) -> float:
        """What a plain step took lately, `TIMED` or more behind prompts and the rest's beginning; 0 if that is not known. The middle of
        several stretches, since one of them may have been held up."""
        fresh = [seconds for seconds, step in self.looks if self.launched - step <= STALE]
        return median(fresh) if len(fresh) >= ENOUGH else 0.0

    def takes(self, batch: Batch) -> bool:
        """Whether a step that is launched is one of them; it is counted. Most are like the one before, and no more than that is asked
        of them: what is done in every step counts where one takes a millisecond."""
        if self.launched < self._calm and not (batch.prefills or batch.admissions) and len(batch.decodes) == self._last:
            self.launched += 1
            return True
        return self._admits(batch)

    def _admits(self, batch: Batch) -> bool:
        """All that there is to ask of a step."""
        if self.due:
            return False
        prompts, rows = bool(batch.prefills), len(batch.decodes)
        if self.prompts_after is not None and prompts and self.launched >= self.prompts_after:
            return False
        if not prompts and not self.rows.least <= rows <= self.rows.most:
            return False
        self.launched += 1
        self.mixed += prompts
        self.behind, self._last = prompts, rows
        if prompts or batch.admissions:
            self._begun = self.launched
        alike = self.launched - self._begun
        if alike and alike % TIMED == 0:
            mark, self.mark = self.mark, self.clock()
            if alike > TIMED:
                self.looks.append(((self.mark - mark) / TIMED, self.launched))
        end = self.steps * (1 if self.prompts_after is None else LATE)
        self.due = self.launched >= end
        self._calm = 0 if prompts else min(self.launched - alike % TIMED + TIMED, end) - 1
        return True
