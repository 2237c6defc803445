"""Steps at which nobody looks, where drafts do not pay. Plain Python.

In steps of a millisecond nothing is in the processor's cache any more, and whatever is done once takes long: so for a while an engine does
nothing for drafts at all, and the longer they have not paid, the longer (`pace.py`). What it looks at then is one object. This file does
not know when to rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxinfer.batch import Batch

SHORTEST, LONGEST = 32, 256  # steps


@dataclass(slots=True)
class Rest:
    """So many steps, one behind another, whatever they do. size: see `Speculator`, when it began. late: it ends with the first prompts that
    come behind them, for a draft model has to see a sequence from its beginning, or after twice as many steps. launched: so far; plain: of
    these, those without prompts. over: what ends now is to be told as usual."""

    size: int
    steps: int = SHORTEST
    late: bool = False
    launched: int = 0
    plain: int = 0
    over: bool = False

    @property
    def due(self) -> bool:
        """Whether it ends now, if no prompts come."""
        return self.launched >= self.steps * (2 if self.late else 1)

    def takes(self, batch: Batch) -> bool:
        """Whether a step that is launched is one of them; it is counted."""
        if self.due or (self.launched >= self.steps and batch.prefills):
            return False
        self.launched += 1
        self.plain += not batch.prefills
        return True
