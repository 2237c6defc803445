"""What each way to run a step takes when the engine starts: the first entries of `Costs`.

Seconds are those of a monotonic clock. This file does not know what drafts are worth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxinfer.batch import Batch
from jaxinfer.engine.costs import ALONE, FOLLOWED, PLAIN, Costs, Way
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.forward import Demand
from jaxinfer.step.inputs import pack
from jaxinfer.step.program import Program

ROUNDS = 5
BEHIND = 4  # steps that are launched one behind the other to see what one takes


def measure(program: Program, overlapping: Callable[[Way], bool] = lambda way: False) -> Costs:
    """Time every step without prompts a few times, with rows that hold nothing: attention to a long context is not in it.

    overlapping: whether steps that are run so are launched while another runs.
    """
    runs = [(way, bucket.decode_rows, run) for bucket in program.config.buckets for way, run in _runs(program, bucket)]
    taken: dict[tuple[Way, int], float] = {}
    for turn in range(1 + ROUNDS):  # the first touches memory for the first time; what disturbs one turn disturbs all ways to run
        for way, rows, run in runs:
            seconds = _timed(run, BEHIND if overlapping(way) else 1)
            taken[way, rows] = seconds if turn <= 1 else min(seconds, taken[way, rows])
    costs = Costs()
    for (way, rows), seconds in taken.items():
        costs.set(way, rows, seconds)
    return costs


def _runs(program: Program, bucket: Bucket) -> Iterator[tuple[Way, Callable[[], Any]]]:
    if bucket.prefill_tokens:
        return
    packed = pack(Batch((), ()), program.config.shapes(bucket))
    if bucket.decode_tokens == 1:
        for way in (PLAIN, ALONE):
            yield way, lambda: program.sample(program.forward(packed, alone=True), Demand.GREEDY).token
        if program.config.draft is not None:
            yield FOLLOWED, lambda: program.sample(program.forward(packed), Demand.GREEDY).token
        return
    yield Way(bucket.decode_tokens), lambda: program.verify(program.forward(packed), Demand.GREEDY).counts
    if program.config.draft is not None:
        drafting = Way(bucket.decode_tokens, hidden=True)
        yield drafting, lambda: program.verify(program.forward(packed, Demand.GREEDY), Demand.GREEDY).counts


def _timed(run: Callable[[], Any], count: int) -> float:
    begun = time.perf_counter()
    for _ in range(count - 1):
        run()
    run().block_until_ready()
    return (time.perf_counter() - begun) / count
