"""How long a GPU was busy while something ran, by its own clock: jax's profiler writes down when each kernel began and ended.

What the host takes to launch a kernel (5 to 20 us, more than a small one runs) and the gaps between kernels do not count, those in
which two ran at a time count once. Nothing where the profile has no kernels: on other platforms, or without CUPTI. XLA launches kernels
one by one while it is profiled, not as command buffers, so launches are not seen as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax

PLANE, LINE = "/device:GPU", "Stream"  # what kernels are found under in a profile; other lines say the same again
NUMBER = re.compile(r"[._]\d+$")  # what XLA tells kernels of one kind apart by


class Span(NamedTuple):
    """A kernel or a copy: when it began and ended, in nanoseconds."""

    begin: float
    end: float
    name: str


class Kernel(NamedTuple):
    """All kernels of one name: how many ran, and for how many seconds together."""

    name: str
    runs: int
    seconds: float


def spans_of(run: Callable[[], Any]) -> list[Span]:
    """Run it, to its end, and say what ran on GPUs meanwhile."""
    with TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        return [span for file in Path(folder).rglob("*.xplane.pb") for span in spans_in(jax.profiler.ProfileData.from_file(str(file)))]


def busy_seconds(run: Callable[[], Any]) -> float | None:
    """For how long kernels and copies ran while it did; None if none is known of."""
    spans = spans_of(run)
    return covered(spans) * 1e-9 if spans else None


def spans_in(profile: Any) -> list[Span]:
    """What ran on GPUs in a profile."""
    lines = (line for plane in profile.planes if plane.name.startswith(PLANE) for line in plane.lines if line.name.startswith(LINE))
    return [Span(event.start_ns, event.start_ns + event.duration_ns, event.name) for line in lines for event in line.events]


def covered(spans: Iterable[Span]) -> float:
    """How much of the time line the spans cover."""
    total, reached = 0.0, float("-inf")
    for begin, end, _ in sorted(spans):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def by_name(spans: Iterable[Span]) -> list[Kernel]:
    """The spans by name, without the numbers behind them, the longest first."""
    found: dict[str, tuple[int, float]] = {}
    for begin, end, name in spans:
        kind = NUMBER.sub("", name)
        count, seconds = found.get(kind, (0, 0.0))
        found[kind] = count + 1, seconds + (end - begin) * 1e-9
    return sorted((Kernel(name, *value) for name, value in found.items()), key=lambda kernel: -kernel.seconds)
