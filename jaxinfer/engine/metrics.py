"""What an engine counts about itself: plain numbers that anyone may read at any moment.

The engine's thread writes, others only read. Times are seconds of a monotonic clock. How the figures are exported is not known here.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StepRecord:
    """One step: its phase (decode, or mixed when a prompt was computed in it), duration, the wait between it and the step before,
    and tokens computed with and without padding."""

    phase: str
    seconds: float
    host_gap: float
    tokens: int
    padded_tokens: int


@dataclass
class EngineMetrics:
    """Gauges (running, waiting, kv_usage from 0 to 1), totals since the start, and the latest steps (oldest dropped).

    drafts: rows that had some. accepted_at: drafts that stood, by their place among the row's, from 0. shadow: "checks", finished requests
    that were run again without drafts, and "mismatches", those of them whose tokens differed (`serve/shadow.py`).
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    steps_total: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    compile_seconds: dict[str, float] = field(default_factory=dict)
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: Counter[int] = field(default_factory=Counter)
    shadow: Counter[str] = field(default_factory=Counter)
    steps: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=4096))

    def record(self, step: StepRecord) -> None:
        """Count one step."""
        self.steps_total += 1
        self.steps.append(step)
