"""Which sequences run in the next step, and in which pages and slots: plain Python, never reaches jax.

Life of a sequence: `add` puts it in the waiting line; `schedule` admits it (a slot, pages for its whole prompt; pages whose content is
cached already are taken as they are), computes its prompt in chunks beside the decodes of the others, then decodes one token a step;
`append` takes the token that a step sampled; `finish` ends it at any moment. A decode may carry drafts: pages are planned for the case
that all of them stand, and `commit` takes back what does not; in a step with prompts in it there are none. Where limits allow it, a
sequence goes on before that is known, planned for the same case (`Row.unsettled`). On a mesh with a data axis
every replica has its own pages and slots, and a sequence stays where it was admitted.

Steps overlap: `schedule` may be called while the batch before is not committed. What a launched step still uses (pages, a slot)
comes free only when `commit` is told that the step is done, and a sequence whose last possible token is on its way rests until then.

When pages run out, the running sequence of lowest standing (priority, then latest arrival) is preempted: it gives everything back and
waits at the head of its class to be computed again. Admission keeps some pages free for those that run, so this stays rare. The one of
highest standing always moves and nobody's standing sinks, so everybody's turn comes.

Several sequences of one request share their prompt: siblings wait until the first has computed it, then take its full pages as they
are and a copy of the one that its last token falls into, and compute that token alone. If the first ends before, they proceed alone.
This file does not know about texts, stop rules or buckets.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Values
from itertools import chain, count

from jaxinfer.batch import LAST_SAMPLED, Admission, Batch, PageCopy, Row
from jaxinfer.cache.pages import PagePool
from jaxinfer.cache.prefix import Chain
from jaxinfer.engine import policies
from jaxinfer.engine.accounts import Accounts, check
from jaxinfer.engine.line import Line
from jaxinfer.engine.sequence import NEVER, Family, Key, Launched, Limits, Place, Sequence, Step
from jaxinfer.request import Request

__all__ = ["Key", "Limits", "Scheduler", "Sequence"]

HEADROOM = 2  # pages kept free at admission for each sequence that runs
NO_DRAFTS: Mapping[Key, Values[int]] = {}
_DECODE = (LAST_SAMPLED,)


class Scheduler:
    """Decides step by step; `pools` has one page pool for each data replica.

    Attributes: preemptions, looked_up and reused (tokens of admitted sequences, and those of them found computed).
    """

    def __init__(self, limits: Limits, pools: Values[PagePool], policy: str = "fcfs") -> None:
        self.limits = limits
        self.pools = list(pools)
        self.preemptions = self.looked_up = self.reused = 0
        self._line = Line(policies.find(policy))
        self._families: dict[str, Family] = {}
        self._ripe: list[Family] = []
        self._parked = 0
        self._running: list[Sequence] = []  # best standing first
        self._leaving: dict[Sequence, None] = {}
        self._launched: deque[Launched] = deque()
        self._slots = [list(range(limits.sequences * (r + 1) - 1, limits.sequences * r - 1, -1)) for r in range(limits.replicas)]
        self._indexes = tuple(pool.index for pool in self.pools if pool.index is not None)
        self._arrivals = count()
        self._page_size = self.pools[0].page_size
        self._step = 0

    @property
    def running(self) -> int:
        """Sequences that were admitted and have neither ended nor been preempted."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that hold nothing yet (or again)."""
        return len(self._line) + self._parked

    @property
    def usage(self) -> float:
        """Share of the KV pages that is owned, 0 to 1; cached pages are as good as free."""
        return sum(pool.owned for pool in self.pools) / sum(pool.size - 1 for pool in self.pools)

    @property
    def uncommitted(self) -> int:
        """Batches that were scheduled and not committed."""
        return len(self._launched)

    def add(self, request: Request, limit: int = NEVER) -> Sequence:
        """Put a request that may produce `limit` tokens in the line. The caller has checked that it can ever fit."""
        known = Chain((request.cache_salt,), self._indexes)
        sequence = Sequence(request, request.ids[:], limit, next(self._arrivals), known)
        family = self._families.setdefault(request.id, Family())
        first = family.members[0] if family.members else None
        family.members.append(sequence)
        if first is not None and sequence.begins_like(first) and first not in family.ready:
            sequence.chain.digests = first.chain.digests[: len(request.prompt) // self.pools[0].page_size + 1]
            family.parked.append(sequence)
            self._parked += 1
        else:
            self._line.push(sequence)
        return sequence

    def find(self, request_id: str) -> list[Sequence]:
        """Every sequence of one request, running or waiting."""
        return list(self._families[request_id].members) if request_id in self._families else []

    @property
    def decoding(self) -> list[Sequence]:
        """The sequences that the next step decodes, if it is one without prompts as far as is known now; else none: it takes no drafts."""
        if any(sequence.missing > 1 for sequence in self._running) or (len(self._line) and any(self._slots)):
            return []
        return [sequence for sequence in self._running if not sequence.last and self._may_go_on(sequence)]

    def schedule(self, drafts: Mapping[Key, Values[int]] = NO_DRAFTS) -> Batch | None:
        """Choose the rows of the next step and reserve their pages.

        drafts: for sequences that decode, the tokens that may come after their last one (ids, or `DRAFTED`); as many of them are taken as
        pages and the sequence's limit allow.

        Returns:
            None when nothing can run now: nobody is here, or all depends on a batch that is not committed.
        """
        self._step += 1
        for family in self._ripe:
            self._unpark(family)
        self._ripe.clear()
        step = Step([self.limits.prefill_tokens] * len(self.pools), [self.limits.prefill_rows] * len(self.pools))
        prefilling = []
        for sequence in tuple(self._running):
            missing = sequence.missing
            if missing > 1:
                prefilling.append(sequence)
            elif missing == 1 and sequence.running and not sequence.last and self._may_go_on(sequence) and self._room(sequence, step):
                self._decode(sequence, step, drafts.get(sequence.request.key, ()))
        for sequence in prefilling:
            if sequence.running:
                self._prefill(sequence, step)
        self._admit(step)
        return self._launch(step)

    def commit(self, batch: Batch, counts: Values[int] = ()) -> list[Sequence | None]:
        """A batch is done on the device: what only it still used comes free. Once for each batch, in order, before its tokens are appended.

        counts: how many tokens each of its decode rows has drawn; needed where there were drafts.

        Returns:
            For each row its sequence, None if that has ended since.

        Raises:
            ValueError: it is not the oldest uncommitted batch.
        """
        if not self._launched or self._launched[0].batch is not batch:
            raise ValueError("batches are committed once each, in the order in which they were scheduled")
        launched = self._launched.popleft()
        for replica, page in launched.sources:
            self.pools[replica].release((page,))
        for row, sequence, drawn in zip(batch.decodes if batch.decode_tokens > 1 else (), launched.sequences, counts, strict=False):
            if len(row.tokens) > 1:
                sequence.settle(len(row.tokens) - 1, drawn - 1)
        for sequence in launched.sequences:
            sequence.in_flight -= 1
            if not sequence.in_flight and sequence in self._leaving:
                self._release(sequence)
        return [None if sequence.ended else sequence for sequence in launched.sequences]

    def append(self, sequence: Sequence, token: int) -> None:
        """Take the token that a step sampled; it is the next one to be computed."""
        sequence.tokens.append(token)
        sequence.pending -= 1
        if sequence.running:
            self._enter(sequence)

    def finish(self, sequence: Sequence) -> None:
        """End a sequence wherever it is; what it holds comes free when no launched step uses it."""
        if sequence.ended:
            return
        sequence.ended = True
        family = self._families[sequence.request.id]
        family.members.remove(sequence)
        if not family.members:
            del self._families[sequence.request.id]
        if sequence in family.parked:
            family.parked.remove(sequence)
            self._parked -= 1
        self._line.remove(sequence)
        if sequence.running:
            self._leave(sequence)
        else:
            self._follow(family)

    def poison(self, sequence: Sequence) -> list[int]:
        """What a sequence wrote is not to be trusted: none of it, nor what others computed behind it, is ever found in the cache again.

        Returns:
            Those of the pages, in the sequence's replica, that nobody else holds: they may be wiped.
        """
        found = set(sequence.pages[sequence.reused // self._page_size :])
        for replica, pool in enumerate(self.pools):
            pages = pool.poison(sequence.chain)
            found.update(pages if replica == sequence.replica else ())
        pool, own = self.pools[sequence.replica], set(sequence.pages)
        return sorted(page for page in found if pool.owners(page) == (page in own))

    def check(self) -> None:
        """Verify the invariants of pools, slots and sequences.

        Raises:
            RuntimeError: an invariant is broken.
        """
        sources = [source for launched in self._launched for source in launched.sources]
        check(Accounts(self.limits, self.pools, self._running, list(self._leaving), sources, list(chain(*self._slots))))

    def _may_go_on(self, sequence: Sequence) -> bool:
        """Whether it is known where its next token lies, or the device can tell: it knows what came of one step, the latest."""
        return not sequence.drafts or (self.limits.unsettled and sequence.in_flight == 1)

    def _room(self, sequence: Sequence, step: Step) -> bool:
        """Make room for a sequence's next token, at the cost of those of lower standing.

        Victims are taken from the end of the running list and rows are made from its front, so none has a row in the batch already.
        While pages are about to come free (a launched step still reads them) the sequence just waits.
        """
        replica, pool = sequence.replica, self.pools[sequence.replica]
        if pool.grow(sequence.pages, sequence.length):
            return True
        if replica not in step.coming:
            going = [*self._leaving, *(s for s in self._running if s.last)]
            step.coming[replica] = sum(pool.exclusive(s.pages) for s in going if s.replica == replica)
        while not step.coming[replica]:
            victim = next(s for s in reversed(self._running) if s.replica == replica and not s.last)
            step.coming[replica] += pool.exclusive(victim.pages) if victim.in_flight else 0
            self._preempt(victim)
            if victim is sequence:
                return False
            if pool.grow(sequence.pages, sequence.length):
                return True
        step.coming[replica] -= 1
        return False

    def _decode(self, sequence: Sequence, step: Step, drafts: Values[int] = ()) -> None:
        """The row of a sequence whose last token alone is missing; what stands in its slot is that token. Drafts cost nobody a page."""
        at = sequence.computed
        row = _DECODE if at >= len(sequence.request.prompt) else (sequence.tokens[at],)
        most = min(len(drafts), sequence.limit - sequence.drawn - sequence.pending - 1) if drafts else 0
        if most > 0 and self.pools[sequence.replica].grow(sequence.pages, sequence.length + most):
            row += tuple(drafts[:most])
        self._row(sequence, row, step, 0)

    def _prefill(self, sequence: Sequence, step: Step) -> None:
        """The next chunk of a sequence whose tokens are not computed yet, as far as the step's limits go."""
        replica = sequence.replica
        tokens = min(sequence.missing, step.tokens[replica])
        if tokens < 1 or step.rows[replica] < 1:
            return
        step.tokens[replica] -= tokens
        step.rows[replica] -= 1
        self._row(sequence, sequence.tokens[sequence.computed : sequence.computed + tokens], step, 1)

    def _row(self, sequence: Sequence, tokens: Values[int], step: Step, kind: int) -> None:
        start, request = sequence.computed, sequence.request
        sequence.computed = end = start + len(tokens)
        sequence.in_flight += 1
        drafts = 0 if kind else len(tokens) - 1
        samples = end == sequence.length + drafts
        row = Row(request, sequence.slot, start, tokens, sequence.pages, samples, sequence.replica, sequence.drafts > 0)
        (step.prefills if kind else step.decodes).append(row)
        step.sequences[kind].append(sequence)
        sequence.drafts += drafts
        if samples:
            sequence.pending += 1 + drafts
        if tokens is not _DECODE:
            self._enter(sequence)
        if start < len(request.prompt) <= end:
            self._ripen(sequence)

    def _ripen(self, sequence: Sequence) -> None:
        """From the next step on siblings may take the sequence's prompt."""
        family = self._families[sequence.request.id]
        family.ready[sequence] = self._step
        self._ripe.append(family)

    def _enter(self, sequence: Sequence) -> None:
        """Make known what the sequence's pages hold, as far as they are full of known tokens."""
        known = min(sequence.computed, len(sequence.tokens))
        self.pools[sequence.replica].enter(sequence.chain, sequence.tokens, sequence.pages, known)

    def _admit(self, step: Step) -> None:
        """Admit sequences in the policy's order until one does not fit: none overtakes it for its pages or slot."""
        self._line.refresh()
        while any(self._slots) and (sequence := self._line.head()) is not None:
            if sequence.pending or sequence.in_flight:
                return
            fitting = [place for place in self._places(sequence, step) if self._fits(sequence, place, step)]
            if not fitting:
                return
            place = max(fitting, key=lambda p: (p.computed, self.pools[p.replica].available))
            self._line.take()
            self._move_in(sequence, place, step)
            if sequence.missing == 1:
                self._decode(sequence, step)
            else:
                self._prefill(sequence, step)

    def _places(self, sequence: Sequence, step: Step) -> Iterator[Place]:
        """In each replica that has a slot, the place that spares most tokens, if what remains has a row in this step."""
        ready = self._families[sequence.request.id].ready
        sibling = next((s for s, since in ready.items() if since < self._step and sequence.begins_like(s)), None)
        size, most = self._page_size, len(sequence.request.prompt) - 1
        for replica, pool in enumerate(self.pools):
            if not self._slots[replica]:
                continue
            nodes = [] if sequence.whole else pool.match(sequence.chain, sequence.tokens)
            place = Place(replica, [node.page for node in nodes], len(nodes) * size, nodes[-1] if nodes else None)
            if sibling is not None and sibling.replica == replica and most > place.computed:
                pages = list(sibling.pages[: most // size])
                place = Place(replica, pages, most, source=sibling.pages[most // size] if most % size else None)
            if len(sequence.tokens) - place.computed == 1 or (step.tokens[replica] > 0 and step.rows[replica] > 0):
                yield place

    def _fits(self, sequence: Sequence, place: Place, step: Step) -> bool:
        """Whether the pages that are missing are there, and some more for those that run."""
        replica, pool = place.replica, self.pools[place.replica]
        if replica not in step.headroom:
            running = [s for s in self._running if s.replica == replica]
            step.headroom[replica] = sum(min(HEADROOM, self._growth(s)) for s in running)
        needed = pool.needed(len(sequence.tokens)) - len(place.pages) + pool.unowned(place.pages)
        return needed + step.headroom[replica] <= pool.available

    def _growth(self, sequence: Sequence) -> int:
        """Pages that a sequence may ask for until it ends; its last token is never computed."""
        return self.pools[0].needed(len(sequence.request.prompt) + sequence.limit - 1) - len(sequence.pages)

    def _move_in(self, sequence: Sequence, place: Place, step: Step) -> None:
        replica, pool = place.replica, self.pools[place.replica]
        pool.share(place.pages)
        sequence.pages.extend(place.pages)
        if place.source is not None:
            pool.share((place.source,))  # until the copy has run
        pool.grow(sequence.pages, len(sequence.tokens))
        if place.source is not None:
            step.copies.append(PageCopy(place.source, sequence.pages[len(place.pages)], replica))
        sequence.chain.restart(place.node, len(place.pages))
        sequence.slot, sequence.replica, sequence.running = self._slots[replica].pop(), replica, True
        sequence.computed = sequence.chain.reused = place.computed
        self.looked_up += len(sequence.tokens)
        self.reused += place.computed
        insort(self._running, sequence, key=_standing)
        if sequence.computed >= len(sequence.request.prompt):
            self._ripen(sequence)
        step.headroom[replica] += min(HEADROOM, self._growth(sequence))
        step.admissions.append(Admission(sequence.request, sequence.slot, tuple(sequence.output)))

    def _launch(self, step: Step) -> Batch | None:
        if not step.decodes and not step.prefills:
            return None
        if step.prefills:
            step.drop_drafts()
        batch = Batch(tuple(step.decodes), tuple(step.prefills), tuple(step.admissions), tuple(step.copies))
        sources = [(copy.replica, copy.source) for copy in step.copies]
        self._launched.append(Launched(batch, step.sequences[0] + step.sequences[1], sources))
        return batch

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._leave(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self._line.push(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """A sequence no longer runs; what it holds comes free now or with the last batch that has a row of it."""
        del self._running[bisect_left(self._running, sequence.standing, key=_standing)]
        sequence.running = False
        family = self._families.get(sequence.request.id)
        if family is not None:
            family.ready.pop(sequence, None)
            self._follow(family)
        if sequence.in_flight:
            self._leaving[sequence] = None
        else:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self._leaving.pop(sequence, None)
        self.pools[sequence.replica].release(sequence.pages)
        self._slots[sequence.replica].append(sequence.slot)
        sequence.pages, sequence.slot = sequence.pages[:0], -1

    def _follow(self, family: Family) -> None:
        """Nobody waits for the prompt of a sequence that will not have it soon."""
        if family.parked and not any(s not in family.ready and (s.running or s in self._line) for s in family.members):
            self._unpark(family)

    def _unpark(self, family: Family) -> None:
        for sequence in family.parked:
            self._line.push(sequence)
        self._parked -= len(family.parked)
        family.parked.clear()


def _standing(sequence: Sequence) -> tuple[float, int]:
    return sequence.standing
