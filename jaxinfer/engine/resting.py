"""Steps at which nobody looks, where drafts do not pay. Plain Python.

In steps of a millisecond nothing is in the processor's cache any more, and whatever is done once takes long: so for a while an engine does
nothing for drafts at all, and the longer they have not paid, the longer (`pace.py`). What it looks at then is one object. This file does
not know when to rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxinfer.batch import Batch

SHORTEST, LONGEST = 32, 256  # steps
LATE = 2  # times as many for one that waits for prompts


class Span(NamedTuple):
    """Numbers of rows, both included, that one program runs."""

    least: int
    most: int


@dataclass(slots=True)
class Rest:
    """So many steps of so many rows, one behind another, with prompts between them or not. size: see `Speculator`. prompts_after: it ends
    with the first prompts that come behind so many steps, for a draft model has to see a sequence from its beginning, or after `LATE` times
    as many as it has; None: there is no draft model. launched: so far; plain: of these, those without prompts. behind: whether the last one
    had some. over: what ends now is to be told as usual."""

    size: int
    rows: Span
    steps: int = SHORTEST
    prompts_after: int | None = None
    launched: int = 0
    plain: int = 0
    behind: bool = False
    over: bool = False

    @property
    def due(self) -> bool:
        """Whether it ends now, whatever comes."""
        return self.launched >= self.steps * (1 if self.prompts_after is None else LATE)

    def takes(self, batch: Batch) -> bool:
        """Whether a step that is launched is one of them; it is counted."""
        if self.due:
            return False
        prompts, rows = bool(batch.prefills), len(batch.decodes)
        if self.prompts_after is not None and prompts and self.launched >= self.prompts_after:
            return False
        if not prompts and not self.rows.least <= rows <= self.rows.most:
            return False
        self.launched += 1
        self.plain += not prompts
        self.behind = prompts
        return True
