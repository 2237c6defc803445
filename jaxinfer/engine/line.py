"""The line of waiting sequences, in a policy's order: what a step costs does not depend on how long the line is.

A heap holds (key, preempted first, arrival); leaving the line only marks an entry, and marked entries are skipped when they come up.
A key may change while a sequence waits (how much of it is cached): a few keys are computed anew in each step, in rotation.
Nobody is overtaken for ever: after `PATIENCE` admissions past the sequence that waits longest, that one is next, whatever the policy.
This file does not know what it takes to be admitted.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heapify, heappop, heappush
from itertools import count

from jaxinfer.engine.policies import Policy
from jaxinfer.engine.sequence import Sequence

PATIENCE = 256
REFRESHED = 8

Entry = tuple[float, bool, int, int, Sequence]


class Line:
    """Sequences that wait; `key` is the policy."""

    def __init__(self, key: Policy) -> None:
        self._key = key
        self._entries: OrderedDict[Sequence, Entry] = OrderedDict()
        self._order: list[Entry] = []
        self._ages: list[tuple[int, int, Sequence]] = []
        self._numbers = count()
        self._eldest: Sequence | None = None
        self._overtaken = 0  # admissions past the eldest

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._entries

    def push(self, sequence: Sequence) -> None:
        """Let a sequence join at its place."""
        heappush(self._ages, (sequence.arrival, next(self._numbers), sequence))
        self._enter(sequence, self._key(sequence))

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence leave without being admitted; one that is not here is ignored."""
        self._entries.pop(sequence, None)

    def head(self) -> Sequence | None:
        """Who is next, None when nobody waits."""
        if not self._entries:
            return None
        if self._overtaken >= PATIENCE and self._eldest is not None and self._eldest in self._entries:
            return self._eldest
        while self._entries.get(self._order[0][-1]) is not self._order[0]:
            heappop(self._order)
        return self._order[0][-1]

    def take(self) -> Sequence | None:
        """Let the next one leave because it is admitted."""
        sequence = self.head()
        if sequence is not None:
            oldest = self._oldest()
            self._overtaken = self._overtaken + 1 if oldest is self._eldest else 1
            self._eldest = oldest
            del self._entries[sequence]
        return sequence

    def refresh(self) -> None:
        """Compute a few keys anew."""
        for _ in range(min(REFRESHED, len(self._entries))):
            sequence, entry = next(iter(self._entries.items()))
            self._entries.move_to_end(sequence)
            key = self._key(sequence)
            if key != entry[0]:
                self._enter(sequence, key)
        if len(self._order) > 2 * len(self._entries) + 64:
            self._order = list(self._entries.values())
            heapify(self._order)
        if len(self._ages) > 2 * len(self._entries) + 64:
            self._ages = [(sequence.arrival, next(self._numbers), sequence) for sequence in self._entries]
            heapify(self._ages)

    def _enter(self, sequence: Sequence, key: float) -> None:
        entry = (key, not sequence.preemptions, sequence.arrival, next(self._numbers), sequence)
        self._entries[sequence] = entry
        heappush(self._order, entry)

    def _oldest(self) -> Sequence:
        while self._ages[0][-1] not in self._entries:
            heappop(self._ages)
        return self._ages[0][-1]
