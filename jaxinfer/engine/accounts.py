"""What must hold between two steps of a scheduler: pages, slots and sequences add up. Plain Python; nothing is changed here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Values
from dataclasses import dataclass
from itertools import chain

from jaxinfer.cache.pages import PagePool
from jaxinfer.engine.sequence import Limits, Sequence


@dataclass(frozen=True)
class Accounts:
    """What a scheduler holds. running: best standing first. leaving: those that only a launched step still uses. sources: pages that
    launched copies read, with their replica. slots: those that nobody has."""

    limits: Limits
    pools: Values[PagePool]
    running: Values[Sequence]
    leaving: Values[Sequence]
    sources: Values[tuple[int, int]]
    slots: Values[int]


def check(accounts: Accounts) -> None:
    """Verify the invariants of pools, slots and sequences.

    Raises:
        RuntimeError: an invariant is broken.
    """
    holding = [*accounts.running, *accounts.leaving]
    for replica, pool in enumerate(accounts.pools):
        held: list[Values[int]] = [sequence.pages for sequence in holding if sequence.replica == replica]
        held += [(page,) for at, page in accounts.sources if at == replica]
        pool.check(held)
        pages = list(chain.from_iterable(sequence.pages for sequence in holding if sequence.replica == replica))
        if len(pages) != len(set(pages)):
            _check_shared(accounts, replica, Counter(pages))
    slots = [sequence.slot for sequence in holding] + list(accounts.slots)
    if sorted(slots) != list(range(accounts.limits.sequences * accounts.limits.replicas)):
        raise RuntimeError("a slot is lost or used twice")
    _check_running(accounts)


def _check_running(accounts: Accounts) -> None:
    for sequence in accounts.running:
        size = accounts.pools[sequence.replica].page_size
        if not 0 <= sequence.computed <= sequence.length or len(sequence.pages) * size < sequence.computed:
            raise RuntimeError("a sequence has more tokens computed than it has tokens or pages")
        most = sequence.in_flight + sequence.drafts
        if not 0 <= sequence.pending <= most or sequence.length - len(sequence.request.prompt) > sequence.limit:
            raise RuntimeError("a sequence draws more tokens than it may")
    if [s.standing for s in accounts.running] != sorted(s.standing for s in accounts.running):
        raise RuntimeError("the running sequences are not in the order of their standing")


def _check_shared(accounts: Accounts, replica: int, owners: Counter[int]) -> None:
    for sequence in accounts.running:
        size = accounts.pools[replica].page_size
        written = sequence.pages[sequence.computed // size :] if sequence.replica == replica else ()
        if any(owners[page] > 1 for page in written):
            raise RuntimeError("a page is shared but not full")
