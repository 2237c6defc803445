"""What a step costs with and without drafts, for every number of rows: measured when the engine starts, corrected by what steps take.

A way to run a step is PLAIN, WIDE (drafts from the host) or MODEL (drafts from the draft model). Seconds are those of a monotonic clock.
This file does not know what drafts are worth.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from jaxinfer.batch import Batch
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.forward import Demand
from jaxinfer.step.inputs import pack
from jaxinfer.step.program import Program

PLAIN, WIDE, MODEL = "plain", "wide", "model"
ROUNDS = 5
NEW = 0.1  # least weight of the latest step
OUTLIER = 2.0  # a step that takes so many times what is expected counts as this


class Costs:
    """Seconds of a step by way and rows of its program (per replica). Empty until something was measured."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int], float] = {}
        self._steps: Counter[tuple[str, int]] = Counter()

    def set(self, way: str, rows: int, seconds: float) -> None:
        """Note what was measured."""
        self._seconds[way, rows] = seconds

    def take(self, way: str, rows: int, seconds: float) -> None:
        """Correct by what a step took: the first one counts for more than what was measured at the start, with nothing to do."""
        known = self._seconds.get((way, rows), seconds)
        self._steps[way, rows] += 1
        self._seconds[way, rows] = known + max(NEW, 1 / self._steps[way, rows]) * (min(seconds, OUTLIER * known) - known)

    def table(self) -> dict[tuple[str, int], float]:
        """All that is known."""
        return dict(self._seconds)

    def get(self, way: str, rows: int) -> float:
        """Seconds of a step that holds so many rows.

        Raises:
            LookupError: no program measured holds them.
        """
        return self._seconds[way, self._size(way, rows)]

    def seen(self, way: str, rows: int) -> bool:
        """Whether such a step was ever made, not only measured at the start."""
        return self._steps[way, self._size(way, rows)] > 0

    def _size(self, way: str, rows: int) -> int:
        sizes = [size for known, size in self._seconds if known == way and size >= rows]
        if not sizes:
            raise LookupError(f"no {way} step of {rows} rows was measured")
        return min(sizes)


def measure(program: Program) -> Costs:
    """Time every step without prompts a few times, with rows that hold nothing: attention to a long context is not in it."""
    costs = Costs()
    for bucket in program.config.buckets:
        if not bucket.prefill_tokens:
            for way, run in _runs(program, bucket):
                run()  # the first touches memory for the first time
                costs.set(way, bucket.decode_rows, min(_timed(run) for _ in range(ROUNDS)))
    return costs


def _runs(program: Program, bucket: Bucket) -> Iterator[tuple[str, Callable[[], Any]]]:
    packed = pack(Batch((), ()), program.config.shapes(bucket))
    if bucket.decode_tokens == 1:
        yield PLAIN, lambda: program.sample(program.forward(packed), Demand.GREEDY).token
        return
    yield WIDE, lambda: program.verify(program.forward(packed), Demand.GREEDY).counts
    if program.config.draft is not None:
        yield MODEL, lambda: program.verify(program.forward(packed, Demand.GREEDY), Demand.GREEDY).counts


def _timed(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run().block_until_ready()
    return time.perf_counter() - begun
