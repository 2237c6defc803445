"""Where the engine's thread is in its life, how far loading has come, and when it last made progress.

Written by that thread, read by anybody. This file does not know the engine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum

STALL_FACTOR = 4.0  # no engine counts as hung before this many times its slowest step so far


class Phase(StrEnum):
    """Where the engine's thread is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Stage:
    """What loading is busy with: `done` of `total` of a step called `name`."""

    name: str = "start"
    done: int = 0
    total: int = 0

    def __str__(self) -> str:
        verb = {"read": "reading weights", "shard": "placing weights", "compile": "compiling"}.get(self.name, "starting")
        if not self.total:
            return verb
        return f"{verb} {self.done} of {self.total}" if self.name == "compile" else f"{verb} {100 * self.done // self.total} %"


class Pulse:
    """When the engine last made progress (monotonic seconds), and its slowest step."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.slowest = 0.0

    def quiet(self, seconds: float) -> bool:
        """Whether there was no progress for so long, slow steps of this engine considered."""
        return time.monotonic() - self.last > max(seconds, STALL_FACTOR * self.slowest)

    def beat(self, seconds: float = 0.0) -> None:
        """Note progress, and how long the step took that made it."""
        self.last = time.monotonic()
        self.slowest = max(self.slowest, seconds)
