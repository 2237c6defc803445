"""The shapes that programs are compiled for: THE one list, read by the planner, the compiler and the runner.

A step holds `decode_rows` rows of `decode_tokens` tokens (one, or with drafts to be verified a few), then `prefill_rows` rows that share
`prefill_tokens` tokens; sizes count per data replica. Batches are padded to the smallest bucket that holds them. The number of programs
grows with the logarithm of the limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from jaxinfer.batch import Batch, Row

MANY = 128  # tokens of a step: with more, each costs on every chip; with fewer, accelerators wait for the weights


@dataclass(frozen=True, order=True)
class Bucket:
    """One compiled shape, per data replica."""

    prefill_tokens: int
    prefill_rows: int
    decode_rows: int
    decode_tokens: int = 1

    @property
    def decode_size(self) -> int:
        """Packed tokens that the decode rows own."""
        return self.decode_rows * self.decode_tokens

    @property
    def tokens(self) -> int:
        """Packed tokens that the step computes."""
        return self.decode_size + self.prefill_tokens

    @property
    def rows(self) -> int:
        """Rows that the step may sample from."""
        return self.decode_rows + self.prefill_rows

    def __str__(self) -> str:
        wide = f"x{self.decode_tokens}" if self.decode_tokens > 1 else ""
        return f"decode{self.decode_rows}{wide}" + (f"-prefill{self.prefill_tokens}x{self.prefill_rows}" if self.prefill_tokens else "")


@dataclass(frozen=True)
class Occupancy:
    """What a batch needs of a bucket: the most that any replica holds."""

    prefill_tokens: int
    prefill_rows: int
    decode_rows: int
    decode_tokens: int = 1


def buckets(max_sequences: int, max_prefill_tokens: int) -> tuple[Bucket, ...]:
    """Every shape to compile: decode steps, and mixed steps without decode rows or with all; where many tokens are computed each costs, so
    there are more sizes."""
    half = max_sequences // 2 if max_sequences >= 2 * MANY else 0
    decodes = [Bucket(0, 0, rows) for rows in _decode_rows(max_sequences)]
    mixed = [
        Bucket(tokens, prefill_rows(tokens, max_sequences), rows)
        for tokens in _prefill_tokens(max_prefill_tokens)
        for rows in sorted({0, half if tokens >= 8 * MANY else 0, max_sequences})
    ]
    return tuple(sorted(decodes + mixed))


def verifying(max_sequences: int, drafts: int) -> tuple[Bucket, ...]:
    """The shapes beside `buckets` in which each decode row may have so many drafts, or half as many where four or more are meant: with many
    rows each token costs, and the first drafts stand most often. Steps with prompts in them have none."""
    widths = (1 + drafts // 2, 1 + drafts) if drafts >= 4 else (1 + drafts,)
    return tuple(Bucket(0, 0, rows, width) for width in widths for rows in _powers(1, max_sequences, 4))


def fixed(max_sequences: int, max_prefill_tokens: int) -> tuple[Bucket, ...]:
    """The one shape of deterministic mode: decodes are rows of one token among the prefill rows (see `Batch.folded`), so that every token
    goes through the same arithmetic however it is scheduled."""
    return (Bucket(max_prefill_tokens + max_sequences, max_sequences, 0),)


def prefill_rows(prefill_tokens: int, max_sequences: int) -> int:
    """Prompts that may share so many prompt tokens in one step."""
    return min(max_sequences, max(1, prefill_tokens // 8), 64)


def choose(available: Sequence[Bucket], need: Occupancy) -> Bucket:
    """The bucket with the fewest tokens, then rows, that holds the batch.

    Raises:
        LookupError: none does; the scheduler's limits and the bucket list disagree.
    """
    fitting = [
        b for b in available
        if b.prefill_tokens >= need.prefill_tokens and b.prefill_rows >= need.prefill_rows and b.decode_rows >= need.decode_rows
        and b.decode_tokens >= need.decode_tokens
    ]  # fmt: skip
    if not fitting:
        raise LookupError(f"no compiled program holds {need}")
    return min(fitting, key=lambda b: (b.tokens, b.rows))


def occupancy(batch: Batch, replicas: int) -> Occupancy:
    """What the batch needs, as the maximum over replicas."""

    def most(rows: tuple[Row, ...], weigh: str) -> int:
        sums = [0] * replicas
        for row in rows:
            sums[row.replica] += len(row.tokens) if weigh == "tokens" else 1
        return max(sums)

    return Occupancy(most(batch.prefills, "tokens"), most(batch.prefills, "rows"), most(batch.decodes, "rows"), batch.decode_tokens)


def _decode_rows(last: int) -> list[int]:
    """Powers of two, and of many rows what lies half way between."""
    powers = _powers(1, last, 2)
    between = [(low + high) // 2 for low, high in pairwise(powers) if low >= MANY and high >= low * 3 // 2]
    return sorted({*powers, *between})


def _prefill_tokens(last: int) -> list[int]:
    """Powers of four times 32 as long as a step's time is that of reading the weights, then of two."""
    return sorted({*_powers(32, min(MANY, last), 4), *(_powers(MANY, last, 2) if last > MANY else [])})


def _powers(first: int, last: int, factor: int) -> list[int]:
    """first, first * factor, ... below `last`, then `last` itself."""
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= factor
    return [*sizes, last]
