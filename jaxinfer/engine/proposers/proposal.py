"""What a proposer hands over: tokens that may come next, and what kind of guess they are. Plain Python.

A draft method is a class with the methods of `Proposer` in a file of this folder. This file does not know which there are.
"""

from __future__ import annotations

from collections.abc import Sequence as Values
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from jaxinfer.engine.sequence import Key, Sequence


class Proposal(NamedTuple):
    """Drafts in order (ids, or `DRAFTED`). kind: guesses of one kind come true equally often, as far as is known."""

    tokens: tuple[int, ...]
    kind: str


@runtime_checkable
class Proposer(Protocol):
    """One way to draft. DEVICE: drafts are made on the device, where the host does not see them. HOPED: how likely a draft is thought to
    stand before any was tried, above 0 and below 1."""

    DEVICE: ClassVar[bool]
    HOPED: ClassVar[float]

    def rest(self) -> bool:
        """A new step begins. Whether there was more to read for the last one than could be."""
        ...

    def propose(self, sequence: Sequence, count: int) -> Proposal | None:
        """At most `count` drafts for what follows the sequence's last known token; None if there is no idea."""
        ...

    def forget(self, key: Key) -> None:
        """A sequence has ended."""
        ...


def checked(tokens: Values[int], vocab: int) -> tuple[int, ...]:
    """The drafts before the first that is no token id of the model: a foreign id would be looked up as another token."""
    if not tokens or (min(tokens) >= 0 and max(tokens) < vocab):
        return tuple(tokens)
    bad = next((place for place, token in enumerate(tokens) if not 0 <= token < vocab), len(tokens))
    return tuple(tokens[:bad])
