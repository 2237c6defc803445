"""What the scheduler hands to the compiled step: plain Python values that never reach jax.

A step works on *rows*; each row is one sequence's next tokens. A prefill chunk (n tokens), a decode (1 token) and later a
verification (k + 1 tokens) differ only in how many tokens they carry. On a mesh with a data axis every replica has its own rows,
pages and slots; `replica` says whose a row is, and page ids count within that replica's pool.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxinfer.request import Request

LAST_SAMPLED = -1  # a row's token that is taken from the slot on the device: the one the previous step sampled there


@dataclass(frozen=True)
class Row:
    """One sequence's share of a step.

    slot: where its state lives on the device. start: position of `tokens[0]`. tokens: ids, or `LAST_SAMPLED`.
    pages: page ids that hold positions 0 .. start + len(tokens) - 1. samples: whether the step draws a token after the last one.
    """

    request: Request
    slot: int
    start: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    samples: bool
    replica: int = 0

    @property
    def kv_length(self) -> int:
        """Tokens of the sequence in the cache once this step has written its own."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Admission:
    """A sequence that enters a slot before the step runs; `generated` is what it produced before a preemption."""

    request: Request
    slot: int
    generated: tuple[int, ...] = ()


@dataclass(frozen=True)
class Batch:
    """One step: decode rows first (one token each), then prefill rows, and the sequences that enter their slots before it."""

    decodes: tuple[Row, ...]
    prefills: tuple[Row, ...]
    admissions: tuple[Admission, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows, decodes first."""
        return self.decodes + self.prefills

    @property
    def tokens(self) -> int:
        """Tokens that the step computes, padding not counted."""
        return sum(len(row.tokens) for row in self.rows)
