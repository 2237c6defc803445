"""Gaps in a device's memory, for what steps bring and make.

XLA's allocator puts an array into the smallest gap that holds it. Where there is none but the large rest of the memory it takes the rest's
beginning, and the temporaries of the next program come to lie elsewhere than before: then XLA writes that program's whole command buffer
anew (see `executable.InTurns`). Gaps of exactly the sizes of what steps bring and make leave the rest to temporaries, of which there are
those of one program at a time. This file does not know what programs compute, or whose memory it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from jaxinfer import sampling
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.keys import ProgramConfig

UNIT = 256  # bytes: XLA's allocator hands out multiples of it
NUMBER = 4  # bytes of all that is meant here
ALIVE = 4  # steps whose arrays there is room for: two in the air, one that is being made and one that is given back
Held = TypeVar("Held")


def wanted(config: ProgramConfig) -> Counter[int]:
    """How many gaps of so many bytes each device needs. Masks of grammars are not thought of."""
    most = Counter[int]()
    for bucket in config.buckets:
        most |= Counter(-(-numbers * NUMBER // UNIT) * UNIT for numbers in _numbers(config, bucket))
    return Counter({size: count * ALIVE for size, count in most.items()})


def _numbers(config: ProgramConfig, bucket: Bucket) -> list[int]:
    """The numbers of each array that a step brings to a device or makes there and that outlasts the step, or the first of its programs;
    but for what lies where the step before put it."""
    rows, draws = bucket.rows * config.pool.replicas, bucket.rows * config.pool.replicas * bucket.decode_tokens
    found = [*(draws,) * 3, *(draws * sampling.reported(config.vocab),) * 2]
    if not bucket.prefill_tokens:
        found.append(config.shapes(bucket).buffer[1])
    if bucket.decode_tokens > 1:
        found += [rows] if config.draft is None else [rows, bucket.rows * (bucket.decode_tokens - 1)]
    return found


def make(gaps: Counter[int], take: Callable[[int], Held]) -> tuple[Held, ...]:
    """Make gaps, which last as long as what is returned: it lies between them. take: so many bytes, given back when nobody holds them."""
    held = list[Held]()
    for size, count in sorted(gaps.items()):
        held += [take(size) for _ in range(2 * count + 1)][::2]
    return tuple(held)


def taken(gaps: Counter[int]) -> int:
    """Bytes of gaps and of what lies between them."""
    return sum(size * (2 * count + 1) for size, count in gaps.items())
