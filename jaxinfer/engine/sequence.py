"""What the scheduler works with: sequences on their way, the limits of a step, a batch in the making. Plain Python values.

A sequence waits, runs (it has a slot and pages), may be preempted and wait again, and ends. Steps are launched before the one before
is known, so three clocks count its tokens: `tokens` are known on the host, `length` counts those that launched steps are drawing as
well, `computed` is what the cache will hold once everything launched has run.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from jaxinfer.batch import Admission, Batch, PageCopy, Row
from jaxinfer.cache.prefix import Chain, Node
from jaxinfer.request import Request

Key = tuple[str, int]
NEVER = 1 << 62
PATIENCE = 4  # preemptions after which a sequence's priority no longer makes it a victim


@dataclass(frozen=True)
class Limits:
    """What one step may hold, per replica: sequences running, prompt tokens, and sequences whose prompt is being computed.

    unsettled: whether a sequence may be in a step while it is not known how many of its drafts in the step before stand.
    """

    sequences: int
    prefill_tokens: int
    prefill_rows: int
    replicas: int = 1
    unsettled: bool = False


@dataclass(eq=False, slots=True)
class Sequence:
    """One request on its way. Invariant: 0 <= computed <= length, and while it runs its pages hold the first `computed` tokens.

    tokens: prompt and output known on the host. limit: most output tokens. arrival: its number in order of arrival. pending: tokens
    sampled on the device and not known yet (one for each uncommitted batch at most, and the drafts, all of which may stand).
    in_flight: launched, uncommitted batches with a row of it. drafts: those that are being verified; the clocks count as if all of them
    stood. slot: -1 while it has none.
    """

    request: Request
    tokens: array[int]
    limit: int
    arrival: int
    chain: Chain
    computed: int = 0
    pending: int = 0
    in_flight: int = 0
    drafts: int = 0
    pages: array[int] = field(default_factory=lambda: array("i"))
    slot: int = -1
    replica: int = 0
    running: bool = False
    ended: bool = False
    preemptions: int = 0

    @property
    def output(self) -> list[int]:
        """Tokens generated so far, as far as they are known."""
        return list(self.tokens[len(self.request.prompt) :])

    @property
    def drawn(self) -> int:
        """How many tokens of its output are known."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def length(self) -> int:
        """Tokens, those that are being drawn included."""
        return len(self.tokens) + self.pending

    @property
    def missing(self) -> int:
        """Tokens that no scheduled step has computed; 1 means that the next step is a decode."""
        return len(self.tokens) + self.pending - self.computed

    @property
    def reused(self) -> int:
        """Tokens found computed when it was admitted last."""
        return self.chain.reused

    @property
    def last(self) -> bool:
        """Whether its last token is known or on its way: nothing of it is scheduled again."""
        return len(self.tokens) + self.pending - len(self.request.prompt) >= self.limit

    @property
    def cached(self) -> int:
        """How many of its tokens are in the prefix cache now."""
        return 0 if self.whole else self.chain.longest(self.tokens)

    @property
    def whole(self) -> bool:
        """Whether every token of the prompt has to be computed here: it is to be scored."""
        return self.request.params.prompt_logprobs is not None

    def begins_like(self, other: Sequence) -> bool:
        """Whether two sequences of one request share their prompt and may share its pages."""
        return not self.whole and self.request.prompt == other.request.prompt and self.request.cache_salt == other.request.cache_salt

    @property
    def standing(self) -> tuple[float, int]:
        """Who keeps its pages longest: by priority, then by arrival; who was preempted often enough goes before every priority."""
        return (float("-inf") if self.preemptions >= PATIENCE else self.request.priority, self.arrival)

    def settle(self, drafts: int, stand: int) -> None:
        """So many of a step's drafts stand: what the cache holds of the others is written over by what comes in their places."""
        self.drafts -= drafts
        self.pending -= drafts - stand
        if self.running:
            self.computed -= drafts - stand


@dataclass(eq=False)
class Family:
    """The sequences of one request that have not ended.

    ready: those whose prompt is computed, and since which step. parked: those that wait for the first one's.
    """

    members: list[Sequence] = field(default_factory=list)
    ready: dict[Sequence, int] = field(default_factory=dict)
    parked: list[Sequence] = field(default_factory=list)


@dataclass(eq=False)
class Launched:
    """A batch that is not committed yet: whose its rows are, and the pages that its copies read."""

    batch: Batch
    sequences: list[Sequence]
    sources: list[tuple[int, int]]


@dataclass
class Step:
    """A batch in the making. Per replica: prompt tokens and rows left, and pages that come free without anybody's doing (once asked)."""

    tokens: list[int]
    rows: list[int]
    decodes: list[Row] = field(default_factory=list)
    prefills: list[Row] = field(default_factory=list)
    sequences: list[list[Sequence]] = field(default_factory=lambda: [[], []])
    admissions: list[Admission] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    coming: dict[int, int] = field(default_factory=dict)
    headroom: dict[int, int] = field(default_factory=dict)

    def drop_drafts(self) -> None:
        """The decode rows of a step with prompts in it have no drafts."""
        for number, (row, sequence) in enumerate(zip(self.decodes, self.sequences[0], strict=True)):
            if len(row.tokens) > 1:
                self.decodes[number] = row._replace(tokens=row.tokens[:1])
                sequence.settle(len(row.tokens) - 1, 0)


@dataclass(frozen=True)
class Place:
    """Where a sequence could be admitted: with these pages in front, tokens of them that need not be computed, a page to copy."""

    replica: int
    pages: list[int]
    computed: int
    node: Node | None = None
    source: int | None = None
