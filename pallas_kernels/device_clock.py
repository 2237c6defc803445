"""How long a GPU was busy while something ran, by its own clock: jax's profiler writes down when each kernel began and ended.

What the host takes to launch a kernel (5 to 20 us, more than a small one runs) and the gaps between kernels do not count, those in
which two ran at a time count once. None where the profile has no kernels: on other platforms, or without CUPTI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

PLANE, LINE = "/device:GPU", "Stream"  # what kernels are found under in a profile; other lines say the same again


def busy_seconds(run: Callable[[], Any]) -> float | None:
    """Run it, to its end, and say for how long kernels and copies ran meanwhile."""
    with TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        spans = [span for file in Path(folder).rglob("*.xplane.pb") for span in spans_in(jax.profiler.ProfileData.from_file(str(file)))]
    return covered(spans) * 1e-9 if spans else None


def spans_in(profile: Any) -> list[tuple[float, float]]:
    """Beginning and end of what ran, in nanoseconds."""
    lines = (line for plane in profile.planes if plane.name.startswith(PLANE) for line in plane.lines if line.name.startswith(LINE))
    return [(event.start_ns, event.start_ns + event.duration_ns) for line in lines for event in line.events]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much of the time line the spans cover."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total
