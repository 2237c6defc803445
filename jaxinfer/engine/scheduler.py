"""Which sequences run in the next step, and in which pages and slots: plain Python, never reaches jax.

Life of a sequence: `add` puts it in the waiting line; `schedule` admits it (a slot, pages for its whole prompt), computes its prompt
in chunks beside the decodes of the others, then decodes one token a step; `append` takes the token that a step sampled; `finish`
gives slot and pages back. When pages run out the sequence admitted last is preempted: it gives everything back and waits at the
head of the line to be computed again. On a mesh with a data axis every replica has its own pages and slots, and a sequence
stays where it was admitted. This file does not know about texts, stop rules or buckets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Values
from dataclasses import dataclass, field
from itertools import chain, islice

from jaxinfer.batch import LAST_SAMPLED, Admission, Batch, Row
from jaxinfer.cache.pages import PagePool
from jaxinfer.engine import policies
from jaxinfer.request import Request

Key = tuple[str, int]


@dataclass(frozen=True)
class Limits:
    """What one step may hold, per replica: sequences running, prompt tokens, and sequences whose prompt is being computed."""

    sequences: int
    prefill_tokens: int
    prefill_rows: int
    replicas: int = 1


@dataclass(eq=False)
class Sequence:
    """One request on its way. Invariant: 0 <= computed <= len(tokens), and pages hold the first `computed` tokens.

    tokens: prompt and output so far. computed: how many of them are in the cache. slot: -1 while waiting.
    """

    request: Request
    tokens: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    replica: int = 0

    @property
    def output(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def missing(self) -> int:
        """Tokens that are known but not in the cache yet; 1 means that the next step is a decode."""
        return len(self.tokens) - self.computed


@dataclass
class _Budget:
    """What is left of a step's limits for one replica."""

    tokens: int
    rows: int


class Scheduler:
    """Decides step by step; `pools` has one page pool for each data replica."""

    def __init__(self, limits: Limits, pools: Values[PagePool], policy: str = "fcfs") -> None:
        self.limits = limits
        self.pools = list(pools)
        self.preemptions = 0
        self._order = policies.find(policy)
        self._waiting: dict[Key, Sequence] = {}
        self._preempted: dict[Key, Sequence] = {}
        self._running: dict[Key, Sequence] = {}
        self._slots = [list(range(limits.sequences * (r + 1) - 1, limits.sequences * r - 1, -1)) for r in range(limits.replicas)]

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that hold nothing yet (or again)."""
        return len(self._waiting) + len(self._preempted)

    @property
    def usage(self) -> float:
        """Share of the KV pages that is owned, 0 to 1."""
        return sum(pool.owned for pool in self.pools) / sum(pool.size - 1 for pool in self.pools)

    def add(self, request: Request) -> Sequence:
        """Put a request at the end of the line. The caller has checked that it can ever fit."""
        sequence = Sequence(request, list(request.prompt))
        self._waiting[request.key] = sequence
        return sequence

    def find(self, request_id: str) -> list[Sequence]:
        """Every sequence of one request, running or waiting."""
        lines = chain(self._running.values(), self._preempted.values(), self._waiting.values())
        return [sequence for sequence in lines if sequence.request.id == request_id]

    def append(self, sequence: Sequence, token: int) -> None:
        """Take the token that a step sampled; it is the next one to be computed."""
        sequence.tokens.append(token)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is and give back what it holds."""
        for line in (self._running, self._preempted, self._waiting):
            line.pop(sequence.request.key, None)
        self._give_back(sequence)

    def schedule(self) -> Batch | None:
        """Choose the rows of the next step and reserve their pages; None when nothing waits or runs."""
        decodes = [row for sequence in list(self._running.values()) for row in self._decode(sequence)]
        budgets = [_Budget(self.limits.prefill_tokens, self.limits.prefill_rows) for _ in self.pools]
        prefills = [row for sequence in list(self._running.values()) for row in self._prefill(sequence, budgets[sequence.replica])]
        admissions: list[Admission] = []
        for sequence in self._admissible(budgets):
            admissions.append(Admission(sequence.request, sequence.slot, tuple(sequence.output)))
            prefills.extend(self._prefill(sequence, budgets[sequence.replica]))
        if not decodes and not prefills:
            return None
        return Batch(tuple(decodes), tuple(prefills), tuple(admissions))

    def sequence(self, row: Row) -> Sequence | None:
        """The sequence that a row of a batch belongs to, None if it has ended since."""
        return self._running.get(row.request.key)

    def check(self) -> None:
        """Verify the invariants of pools, slots and sequences.

        Raises:
            RuntimeError: an invariant is broken.
        """
        for replica, pool in enumerate(self.pools):
            pool.check()
            held = [page for sequence in self._running.values() if sequence.replica == replica for page in sequence.pages]
            if len(held) != len(set(held)) or len(held) != pool.owned:
                raise RuntimeError("pages owned and pages held by sequences differ")
        slots = [sequence.slot for sequence in self._running.values()] + list(chain(*self._slots))
        if sorted(slots) != list(range(self.limits.sequences * self.limits.replicas)):
            raise RuntimeError("a slot is lost or used twice")
        if any(not 0 <= s.computed <= len(s.tokens) or len(s.pages) * self._page_size < s.computed for s in self._running.values()):
            raise RuntimeError("a sequence has more tokens computed than it has tokens or pages")

    @property
    def _page_size(self) -> int:
        return self.pools[0].page_size

    def _decode(self, sequence: Sequence) -> Iterator[Row]:
        """The decode row of a sequence whose last token alone is missing, after making room for it.

        Victims are taken from the end of the running line, so no row that stands in the batch already loses its pages.
        """
        if sequence.missing != 1 or sequence.request.key not in self._running:
            return
        pool = self.pools[sequence.replica]
        while not pool.grow(sequence.pages, len(sequence.tokens)):
            victim = next(s for s in reversed(self._running.values()) if s.replica == sequence.replica)
            self._preempt(victim)
            if victim is sequence:
                return
        yield self._row(sequence, (LAST_SAMPLED,))

    def _prefill(self, sequence: Sequence, budget: _Budget) -> Iterator[Row]:
        """The next chunk of a sequence whose tokens are not computed yet, as far as the budget goes."""
        count = min(sequence.missing, budget.tokens)
        if sequence.missing < 1 or count < 1 or budget.rows < 1:
            return
        budget.tokens -= count
        budget.rows -= 1
        yield self._row(sequence, tuple(sequence.tokens[sequence.computed : sequence.computed + count]))

    def _row(self, sequence: Sequence, tokens: tuple[int, ...]) -> Row:
        start = sequence.computed
        sequence.computed += len(tokens)
        samples = sequence.computed == len(sequence.tokens)
        return Row(sequence.request, sequence.slot, start, tokens, tuple(sequence.pages), samples, sequence.replica)

    def _admissible(self, budgets: list[_Budget]) -> Iterator[Sequence]:
        """Admit sequences in the policy's order until one does not fit: none overtakes it for its pages or slot."""
        for sequence in list(self._next_waiting()):
            open_replicas = [r for r, budget in enumerate(budgets) if self._slots[r] and budget.tokens > 0 and budget.rows > 0]
            replica = max(open_replicas, key=lambda r: self.pools[r].free, default=None)
            if replica is None or not self.pools[replica].grow(sequence.pages, len(sequence.tokens)):
                return
            self._preempted.pop(sequence.request.key, None)
            self._waiting.pop(sequence.request.key, None)
            sequence.slot, sequence.replica = self._slots[replica].pop(), replica
            self._running[sequence.request.key] = sequence
            yield sequence

    def _next_waiting(self) -> Iterable[Sequence]:
        """As many as could be admitted at most, in the policy's order; the rest of the line is not looked at."""
        open_slots = sum(len(slots) for slots in self._slots)
        ordered = self._order(chain(self._preempted.values(), self._waiting.values()))
        return islice(ordered, open_slots)

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._running.pop(sequence.request.key)
        self._give_back(sequence)
        self._preempted = {sequence.request.key: sequence} | self._preempted

    def _give_back(self, sequence: Sequence) -> None:
        self.pools[sequence.replica].release(sequence.pages)
        if sequence.slot >= 0:
            self._slots[sequence.replica].append(sequence.slot)
        sequence.pages, sequence.slot, sequence.computed = [], -1, 0
