"""Bugs to plant in the scheduler, the page pool and the prefix index, by name: the machine must see each of them.

A mutation is a context manager that replaces one method and puts it back. A bug that nobody notices says that a check is missing,
so whoever adds a rule to the scheduler adds the bug that breaks it here.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxinfer.cache.pages import PagePool
from jaxinfer.cache.prefix import Chain, Node, PrefixIndex
from jaxinfer.engine import line
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sequence import Sequence as Running
from jaxinfer.engine.sequence import Step

Original = Callable[..., Any]
MUTATIONS: dict[str, tuple[type, str, Callable[[Original], Any]]] = {}


def mutates(owner: type, method: str) -> Callable[[Callable[[Original], Any]], Callable[[Original], Any]]:
    """Register a function that makes a wrong method out of the right one."""

    def register(make: Callable[[Original], Any]) -> Callable[[Original], Any]:
        MUTATIONS[make.__name__] = (owner, method, make)
        return make

    return register


@contextmanager
def planted(name: str) -> Iterator[None]:
    """While this is open, the bug of that name is there."""
    owner, method, make = MUTATIONS[name]
    original: Any = vars(owner)[method]
    setattr(owner, method, property(make(original.fget)) if isinstance(original, property) else make(original))  # pyright: ignore
    try:
        yield
    finally:
        setattr(owner, method, original)


@mutates(Scheduler, "finish")
def leak_on_abort(original: Original) -> Original:
    """A sequence that ends keeps its first page."""

    def finish(self: Scheduler, sequence: Running) -> None:
        if sequence.running and not sequence.in_flight:
            sequence.pages = sequence.pages[1:]
        original(self, sequence)

    return finish


@mutates(PagePool, "release")
def double_free(original: Original) -> Original:
    """A page that is still owned by another sequence is put among the free ones."""

    def release(self: PagePool, pages: Sequence[int]) -> None:
        shared = [page for page in pages if self._owners[page] > 1]
        original(self, pages)
        self._free.extend(shared)

    return release


@mutates(PagePool, "grow")
def page_edge_too_late(original: Original) -> Original:
    """The first token of a new page gets no page."""

    def grow(self: PagePool, pages: array[int], tokens: int) -> bool:
        return original(self, pages, tokens - (tokens % self.page_size == 1))

    return grow


@mutates(PagePool, "enter")
def page_edge_too_early(original: Original) -> Original:
    """A page is known when its last token is not computed yet."""

    def enter(self: PagePool, chain: Chain, tokens: Sequence[int], pages: Sequence[int], count: int) -> None:
        original(self, chain, tokens, pages, min(count + 1, len(tokens)))

    return enter


@mutates(PagePool, "_evict")
def evict_in_use(original: Original) -> Original:
    """A page that somebody owns is evicted."""

    def evict(self: PagePool) -> int:
        owned = next((page for page in range(1, self.size) if self._owners[page] == 1), None)
        return original(self) if owned is None else owned

    return evict


@mutates(PagePool, "_evict")
def stale_hash(original: Original) -> Original:
    """An evicted page is still known by what it held."""

    def evict(self: PagePool) -> int:
        page = next(iter(self._cached))
        del self._cached[page]
        return page

    return evict


@mutates(PrefixIndex, "_base")
def salt_ignored(original: Original) -> Original:
    """All salts share."""

    def base(self: PrefixIndex, chain: Chain) -> bytes:
        chain.context = ("",)
        return original(self, chain)

    return base


@mutates(PrefixIndex, "_find")
def tokens_not_compared(original: Original) -> Original:
    """A digest is believed."""

    def find(self: PrefixIndex, parent: Node, digest: bytes, content: bytes) -> Node | None:
        node = self._nodes.get(digest)
        return node if node is not None and node.parent is parent else None

    return find


@mutates(PrefixIndex, "_find")
def parent_not_compared(original: Original) -> Original:
    """Equal tokens behind another beginning are taken for the same."""

    def find(self: PrefixIndex, parent: Node, digest: bytes, content: bytes) -> Node | None:
        node = self._nodes.get(digest)
        return node if node is not None and node.content == content else None

    return find


@mutates(PagePool, "share")
def owner_not_counted(original: Original) -> Original:
    """Who takes a page that is owned already is not counted."""

    def share(self: PagePool, pages: Sequence[int]) -> None:
        original(self, [page for page in pages if not self._owners[page]])

    return share


@mutates(PagePool, "match")
def last_token_not_computed(original: Original) -> Original:
    """A prompt that is cached to the end is not computed at all."""

    def match(self: PagePool, chain: Chain, tokens: Sequence[int]) -> list[Node]:
        return self.index.match(chain, tokens, len(tokens) // self.page_size) if self.index is not None else []

    return match


@mutates(Scheduler, "_leave")
def released_before_commit(original: Original) -> Original:
    """Pages and slot come free while a launched step still uses them."""

    def leave(self: Scheduler, sequence: Running) -> None:
        original(self, sequence)
        if sequence in self._leaving:
            self._release(sequence)

    return leave


@mutates(Running, "last")
def limit_ignored(original: Original) -> Original:
    """A sequence runs on though its last token is on its way."""
    return lambda self: False


@mutates(Scheduler, "_admit")
def admitted_with_pending_token(original: Original) -> Original:
    """A preempted sequence is admitted before its token is known."""

    def admit(self: Scheduler, step: Step) -> None:
        head = self._line.head()
        if head is None:
            return
        pending, head.pending, in_flight, head.in_flight = head.pending, 0, head.in_flight, 0
        original(self, step)
        head.pending += pending
        head.in_flight += in_flight

    return admit


@mutates(Scheduler, "_places")
def partial_page_shared(original: Original) -> Original:
    """A sibling takes the page that its first sibling still writes to, without a copy."""

    def places(self: Scheduler, sequence: Running, step: Step) -> Iterator[Any]:
        for place in original(self, sequence, step):
            yield place if place.source is None else type(place)(place.replica, [*place.pages, place.source], place.computed)

    return places


@mutates(Scheduler, "_launch")
def copy_forgotten(original: Original) -> Original:
    """A sibling's own last page is never filled."""

    def launch(self: Scheduler, step: Step) -> Any:
        for copy in step.copies:
            self.pools[copy.replica].release((copy.source,))
        step.copies = []
        return original(self, step)

    return launch


@mutates(Scheduler, "commit")
def copy_source_kept(original: Original) -> Original:
    """The page that a copy read is never given back."""

    def commit(self: Scheduler, batch: Any, counts: Sequence[int] = ()) -> Any:
        self._launched[0].sources.clear()
        return original(self, batch, counts)

    return commit


@mutates(Scheduler, "_room")
def best_is_the_victim(original: Original) -> Original:
    """Who stands first gives way to the others."""

    def room(self: Scheduler, sequence: Running, step: Step) -> bool:
        if self.pools[sequence.replica].grow(sequence.pages, sequence.length):
            return True
        victim = self._running[0]
        if victim.running and not victim.in_flight:
            self._preempt(victim)
        return False

    return room


@mutates(line.Line, "_enter")
def priority_ignored(original: Original) -> Original:
    """Every policy is first come, first served."""
    return lambda self, sequence, key: original(self, sequence, 0)


@mutates(line.Line, "_enter")
def preempted_to_the_end(original: Original) -> Original:
    """Who was preempted waits behind everybody."""
    return lambda self, sequence, key: original(self, sequence, key + 1e9 * bool(sequence.preemptions))


@mutates(Chain, "restart")
def chain_not_restarted(original: Original) -> Original:
    """A sequence that is admitted again believes that its pages are known where it was before."""
    return lambda self, *found: None


@mutates(Scheduler, "_release")
def slot_kept(original: Original) -> Original:
    """A slot is lost with the sequence that had it."""

    def release(self: Scheduler, sequence: Running) -> None:
        replica = sequence.replica
        original(self, sequence)
        if len(self._slots[replica]) == self.limits.sequences:
            self._slots[replica].pop()

    return release


@mutates(Scheduler, "_row")
def token_skipped(original: Original) -> Original:
    """After a chunk one token is left out."""

    def row(self: Scheduler, sequence: Running, tokens: tuple[int, ...], step: Step, kind: int) -> None:
        original(self, sequence, tokens, step, kind)
        sequence.computed += sequence.missing > 3

    return row


@mutates(Scheduler, "_unpark")
def siblings_wait_for_ever(original: Original) -> Original:
    """Siblings are not told that the first has its prompt, or that it never will."""
    return lambda self, family: None


@mutates(PagePool, "poison")
def poison_ignored(original: Original) -> Original:
    """What a broken row wrote is found by others."""
    return lambda self, chain: []


@mutates(Running, "settle")
def rejected_draft_kept(original: Original) -> Original:
    """Where a draft did not stand its keys and values stay."""

    def settle(self: Running, drafts: int, stand: int) -> None:
        computed = self.computed
        original(self, drafts, stand)
        self.computed = computed if drafts - stand == 1 else self.computed

    return settle


@mutates(Scheduler, "_row")
def unsettled_row_not_marked(original: Original) -> Original:
    """A row that begins where the step before has still to tell does not say so."""

    def row(self: Scheduler, sequence: Running, tokens: tuple[int, ...], step: Step, kind: int) -> None:
        original(self, sequence, tokens, step, kind)
        rows = step.prefills if kind else step.decodes
        rows[-1] = rows[-1]._replace(unsettled=False)

    return row


@mutates(Step, "drop_drafts")
def drafts_beside_prompts(original: Original) -> Original:
    """A step with a prompt in it keeps its drafts."""
    return lambda self: None


@mutates(Scheduler, "_decode")
def drafts_past_the_limit(original: Original) -> Original:
    """A sequence may draw more tokens than it may have, if they are drafts."""

    def decode(self: Scheduler, sequence: Running, step: Step, drafts: Sequence[int] = ()) -> None:
        limit, sequence.limit = sequence.limit, sequence.limit + 1
        original(self, sequence, step, drafts)
        sequence.limit = limit

    return decode
