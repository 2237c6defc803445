"""What the scheduler hands to the compiled step: plain Python values that never reach jax.

A step works on *rows*; each row is one sequence's next tokens. A prefill chunk (n tokens), a decode (1 token) and a verification (k + 1
tokens, of which k are drafts) differ only in how many tokens they carry. On a mesh with a data axis every replica has its own rows, pages
and slots; `replica` says whose a row is, and page ids count within that replica's pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from jaxinfer.request import Request

LAST_SAMPLED = -1  # a row's token that is taken from the slot on the device: the one the previous step sampled there
DRAFTED = -2  # a draft that is taken from what the draft model on the device proposed for this row


class Row(NamedTuple):
    """One sequence's share of a step.

    slot: where its state lives on the device. start: position of `tokens[0]`. tokens: ids, or `LAST_SAMPLED`; in a decode row drafts follow
    (ids, or `DRAFTED`), each of which is kept if it is what the step draws in its place.
    pages: page ids that hold positions 0 .. start + len(tokens) - 1, and perhaps more: the sequence's own list, which grows with it, not
    a copy (a long context has thousands); read it before the next batch is scheduled. samples: whether the step draws a token after
    the last one (a decode row: after each, as far as its drafts are kept). unsettled: the step before is not known yet and has drafts of
    the sequence; `start` is where the row begins if all of them are kept, and the device takes back as many positions as are not.
    """

    request: Request
    slot: int
    start: int
    tokens: Sequence[int]
    pages: Sequence[int]
    samples: bool
    replica: int = 0
    unsettled: bool = False

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


class PageCopy(NamedTuple):
    """A page whose content is copied to another one of the same replica, in every layer, before the step's forward."""

    source: int
    target: int
    replica: int = 0


@dataclass(frozen=True)
class Batch:
    """One step: decode rows first (one token each, and drafts), then prefill rows; before it sequences enter slots and pages are copied.

    Within the step every row writes its K and V before any row reads: a row may read pages that another row of the step fills.
    """

    decodes: tuple[Row, ...]
    prefills: tuple[Row, ...]
    admissions: tuple[Admission, ...] = ()
    copies: tuple[PageCopy, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows, decodes first."""
        return self.decodes + self.prefills

    @cached_property
    def decode_tokens(self) -> int:
        """Most tokens of a decode row: more than 1 when there are drafts."""
        return max((len(row.tokens) for row in self.decodes), default=1)

    @property
    def hidden(self) -> bool:
        """Whether drafts are among the tokens that the draft model has still to think of."""
        return self.decode_tokens > 1 and any(DRAFTED in row.tokens for row in self.decodes)

    def folded(self) -> Batch:
        """The same step with its decodes as prefill rows of one token."""
        return replace(self, decodes=(), prefills=self.rows)

    @property
    def tokens(self) -> int:
        """Tokens that the step computes, padding not counted."""
        return sum(len(row.tokens) for row in self.rows)
