"""What offline generation is measured on: prompts of random tokens with a fixed seed, and how many tokens each shall get.

A workload is cut to the model's context. This file does not know who runs it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STATIC_BATCHES = (16, 64)
COMMON, TAIL = 1024, 64
ANY = 1 << 30

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Goal:
    """How much faster than the peer we mean to be: than its float32, and than its fastest dtype (None: reported without a goal)."""

    float32: float | None = None
    fastest: float | None = None


# those that are measured unless some are named; batch-512 only when it is named
DEFAULT = ("batch-1", "batch-16", "mixed-64", "shared-64")
NAMES = (*DEFAULT, "batch-512")
GOALS = {"batch-1": Goal(1.5, 1.2), "batch-16": Goal(1.2), "mixed-64": Goal(2.0), "shared-64": Goal()}


@dataclass(frozen=True)
class Workload:
    """Prompts and how many tokens each shall get. `batches`: static batch sizes that the peer may try (none: it does not run this)."""

    name: str
    prompts: tuple[Tokens, ...]
    outputs: Tokens
    batches: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens to generate."""
        return sum(self.outputs)

    @property
    def longest(self) -> int:
        """The context that it needs."""
        return max(len(prompt) + count for prompt, count in zip(self.prompts, self.outputs, strict=True))


def workloads(names: Iterable[str], vocab: int, length: int = ANY, scale: float = 1.0) -> tuple[Workload, ...]:
    """The named workloads, cut to a context of `length`. `scale` shortens outputs (tests)."""
    draw = random.Random(0)
    mixed = [draw.randrange(16, 256) for _ in range(64)], [draw.randrange(16, 128) for _ in range(64)]
    sizes = {"batch-1": ([32], [128], (1,)), "batch-16": ([32] * 16, [128] * 16, (16,)), "mixed-64": (*mixed, STATIC_BATCHES)}
    made = {}
    for name, (prompts, outputs, batches) in sizes.items():  # all of them: they share one stream of random numbers
        made[name] = _plain(name, draw, vocab, _cut(prompts, outputs, length, scale), batches)
    chosen = set(names)
    if "shared-64" in chosen:
        made["shared-64"] = _shared(vocab, length, scale)
    if "batch-512" in chosen:
        made["batch-512"] = _plain("batch-512", random.Random(512), vocab, _cut([1024] * 512, [256] * 512, length, scale), ())
    return tuple(work for name, work in made.items() if name in chosen)


def _plain(name: str, draw: random.Random, vocab: int, sizes: Sequence[tuple[int, int]], batches: tuple[int, ...]) -> Workload:
    prompts = tuple(_tokens(draw, vocab, count) for count, _ in sizes)
    return Workload(name, prompts, tuple(output for _, output in sizes), batches)


def _shared(vocab: int, length: int, scale: float) -> Workload:
    """One common beginning, as long as fits, and a tail for each request: where a prefix cache matters."""
    draw, most = random.Random(64), max(1, length // 4)
    tails = [min(draw.randrange(16, TAIL + 1), most) for _ in range(64)]
    outputs = [max(1, min(int(draw.randrange(16, TAIL + 1) * scale), most)) for _ in range(64)]
    common = _tokens(draw, vocab, min(COMMON, length - max(tails) - max(outputs)))
    return Workload("shared-64", tuple(common + _tokens(draw, vocab, tail) for tail in tails), tuple(outputs), STATIC_BATCHES)


def _tokens(draw: random.Random, vocab: int, count: int) -> Tokens:
    return tuple(draw.randrange(vocab // 16, vocab) for _ in range(count))


def _cut(prompts: Sequence[int], outputs: Sequence[int], length: int, scale: float) -> list[tuple[int, int]]:
    """Sizes of prompts and outputs that fit a context together; what does not gives way, the output no further than to its half."""
    sizes = []
    for prompt, output in zip(prompts, outputs, strict=True):
        wanted = max(1, int(output * scale))
        count = wanted if prompt + wanted <= length else max(1, min(wanted, length // 2))
        sizes.append((max(1, min(prompt, length - count)), count))
    return sizes
