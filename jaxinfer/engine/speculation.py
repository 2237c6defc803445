"""Who gets drafts in the next step, how many, and whether anybody does: only where they are likely to pay.

For every sequence that decodes, each proposer is asked; of what they say, the guess with the best history is taken, as far as its drafts
are likely enough to stand. Drafts make a step wider for all its rows, so the question is one for the whole step: for each width that there
is a program for, the tokens to be expected per second with drafts against those without, by the history of acceptance and the costs of
steps at this number of rows. What was said and not used is compared with what came, so a history is known where nothing is drafted.

Everything that is done for drafts is charged to them: wide steps, the wait of a plain step behind one whose drafts came from the text, the
time that asking takes, a draft model that keeps up. Where they do not pay, nobody is asked more often than an allowance permits
(`allowance.py`), and the draft model is left out: sequences that it has lost sight of get drafts from their texts alone. Where they do,
steps without are made once in a while, so that their cost is known too. This file does not know how drafts are verified.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxinfer.batch import DRAFTED, Batch, Row
from jaxinfer.config import SpeculationConfig
from jaxinfer.engine.allowance import Allowance
from jaxinfer.engine.costs import ALONE, FOLLOWED, PLAIN, Costs, Way, way_of
from jaxinfer.engine.history import History, enough, worth
from jaxinfer.engine.metrics import EngineMetrics
from jaxinfer.engine.proposers.draft import DraftProposer
from jaxinfer.engine.proposers.eagle import EagleProposer
from jaxinfer.engine.proposers.lookup import LookupProposer
from jaxinfer.engine.proposers.proposal import Proposal, Proposer, checked
from jaxinfer.engine.sequence import Key
from jaxinfer.engine.sequence import Sequence as Running
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.keys import ProgramConfig

MARGIN = 1.08  # what drafts must promise: their worth and what steps cost are estimates
FIRST, FRESH, AGAIN = 8, 256, 3  # after so many steps with drafts, later more, a few are made without, to see what these cost now
SURE, NEAR = 1.2, 32  # where drafts promise less than so much, after so many at most
APART = 16  # steps without drafts between two trials, at least
MOST_RETURNS = 3.0  # for one step with drafts, as far as that is believed
FADING = 0.9  # of what is known of excursions, with each that ends
SPARED = 1.0  # plain steps that must be left for the draft model to keep up where drafts do not seem to pay
PATIENT = 4  # asked in vain so often in a row, proposers are asked as the allowance permits
ASKING = 0.01  # of a plain step is what each plain step earns for being asked where drafts do not pay
DEAR = 0.02  # a step during which asking took more of a plain one's time is no measure of plain ones


class Candidate(NamedTuple):
    """A sequence that decodes in the next step. hidden: whether drafts may be such that the host does not know them."""

    sequence: Running
    hidden: bool = True


class Guess(NamedTuple):
    """A proposal and the chance that each of its drafts stands. likely: that the text goes on such that it can be used at all."""

    proposal: Proposal
    chance: float
    likely: float = 1.0

    def worth(self, count: int) -> float:
        """Tokens that its first `count` drafts are likely to give."""
        return self.likely * worth(self.chance, min(count, len(self.proposal.tokens)))

    @property
    def hidden(self) -> bool:
        """Whether the host does not know its drafts."""
        return self.proposal.tokens[0] == DRAFTED


class Plan(NamedTuple):
    """A step with drafts: how it is run, for whom, how many tokens a row is likely to get, and what it costs in plain steps."""

    way: Way
    guesses: Mapping[Key, Guess]
    tokens: float
    cost: float

    @property
    def promise(self) -> float:
        """Tokens per second, those of a plain step being 1."""
        return self.tokens / self.cost


@dataclass
class Pace:
    """What happened at one number of rows. drafting: drafts seem to pay. vain: how often in a row asking led to none. age: steps with
    drafts since plain ones were last made to see what these cost; looks: how many of those are still to come; until: the age at which they
    are due. apart: plain steps since the last one with drafts. wide, returns: steps with drafts, and plain ones that waited for one; these
    fade."""

    drafting: bool = True
    vain: int = 0
    age: int = 0
    looks: int = 0
    until: int = FIRST
    apart: int = APART
    wide: float = 2.0
    returns: float = 1.0

    def asked(self, *, believed: bool) -> None:
        """Proposers were asked. believed: what they say is likely to pay."""
        self.vain = 0 if believed else self.vain + 1
        self.drafting = believed or (self.drafting and self.vain < PATIENT)

    def drafted(self) -> None:
        """A step with drafts was made."""
        self.age += 1
        self.apart = 0
        self.wide += 1

    def plain(self, *, steady: bool) -> None:
        """One without was made; steady: behind another."""
        self.apart += 1
        if self.apart > APART:
            self.until = FIRST
        if steady:
            self.age, self.looks = 0, max(0, self.looks - 1)

    def returned(self) -> None:
        """One without had to wait for one with drafts."""
        self.wide, self.returns = FADING * self.wide, FADING * self.returns + 1


class Thought(NamedTuple):
    """What was said about a text of so many tokens, and not used."""

    length: int
    proposal: Proposal


@dataclass
class _Sequences:
    """What is known of each sequence. kinds: of the drafts that it was given last. thoughts: of it that were not used. lost: those that the
    draft model has not seen all tokens of."""

    kinds: dict[Key, str] = field(default_factory=dict)
    thoughts: dict[Key, Thought] = field(default_factory=dict)
    lost: set[Key] = field(default_factory=set)

    def use(self, keys: Iterable[Key]) -> None:
        """What was said about these is used."""
        for key in keys:
            self.thoughts.pop(key, None)

    def forget(self, key: Key) -> None:
        """A sequence has ended."""
        self.thoughts.pop(key, None)
        self.lost.discard(key)


@dataclass
class _Since:
    """seconds: that asking took since the last step ended. waited: drafts were wanted that a step had to be awaited for, and no plain step
    has been launched since that had to wait."""

    seconds: float = 0.0
    waited: bool = False


@dataclass
class Speculator:
    """Decides for an engine. always: as many drafts as there are, whatever they cost (tests, selftests, benchmarks). unseen: steps with
    drafts are launched behind others, as plain ones are. clock: seconds."""

    proposers: Sequence[Proposer]
    drafts: int
    vocab: int
    replicas: int
    costs: Costs
    metrics: EngineMetrics
    always: bool = False
    unseen: bool = False
    clock: Callable[[], float] = time.perf_counter
    history: History = field(default_factory=History)
    allowance: Allowance = field(default_factory=Allowance)
    asking: Allowance = field(default_factory=lambda: Allowance(ASKING, 0.0, 1.0))
    _about: _Sequences = field(default_factory=_Sequences)
    _paces: defaultdict[int, Pace] = field(default_factory=lambda: defaultdict(Pace))
    _since: _Since = field(default_factory=_Since)

    def asks(self, rows: int) -> bool:
        """Whether the next step of so many rows may have drafts; False takes no time."""
        size = self._size(rows)
        pace = self._paces[size]
        return self.always or (not pace.looks and (pace.drafting or self.asking.affords(size, 0.0)))

    def propose(self, candidates: Sequence[Candidate]) -> dict[Key, tuple[int, ...]]:
        """The drafts of the next step by sequence; {} where it is better to have none."""
        rows, begun = len(candidates), self.clock()
        size = self._size(rows)
        plan = self._plan({candidate.sequence.request.key: self._guesses(candidate) for candidate in candidates}, size, rows)
        for proposer in self.proposers:
            proposer.rest()
        self._since.seconds += self.clock() - begun
        if plan is None:
            return {}
        self._since.waited = not self.unseen
        self._about.kinds = {key: guess.proposal.kind for key, guess in plan.guesses.items()}
        if not any(candidate.sequence.pending for candidate in candidates):  # else texts are asked again when that has come
            self._about.use(plan.guesses)
        most = plan.way.width - 1
        counts = {key: most if self.always else min(most, enough(guess.chance)) for key, guess in plan.guesses.items()}
        return {key: guess.proposal.tokens[: counts[key]] for key, guess in plan.guesses.items()}

    def leaves_out(self, batch: Batch) -> bool:
        """Whether the draft model stays out of a step. It loses sight of the step's rows then."""
        if self.always or batch.decode_tokens > 1:
            return False
        if not any(proposer.DEVICE for proposer in self.proposers):
            return True
        size, lost = self._size(len(batch.rows)), self._about.lost
        if self._paces[size].drafting:
            return False
        keys = [row.request.key for row in batch.rows]
        if self.allowance.balance(size) >= SPARED and not lost.issuperset(keys):  # so that drafts can be tried again
            return False
        lost.update(keys)
        return True

    def learn(self, rows: Iterable[tuple[Row, int]]) -> None:
        """Take in how many tokens rows with drafts have drawn."""
        for row, count in rows:
            proposed, accepted = len(row.tokens) - 1, count - 1
            if not proposed or accepted < 0:
                continue
            self.history.take(row.request.key, self._about.kinds.get(row.request.key, "draft"), accepted, proposed)
            self.metrics.drafts += 1
            self.metrics.draft_tokens += proposed
            self.metrics.accepted_tokens += accepted
            self.metrics.accepted_at.update(range(accepted))

    def observe(self, batch: Batch, bucket: Bucket, seconds: float, *, drawn: int, steady: bool, followed: bool = False) -> None:
        """Take in a step: how long it took from the end of the one before, how many tokens it drew, whether it was launched behind
        another, as all are where there are no drafts, and whether the draft model saw it."""
        spent, self._since.seconds = self._since.seconds, 0.0
        rows = len(batch.rows)
        size = self._size(rows)
        if batch.prefills:
            self.allowance.settle(size, -self.costs.more(FOLLOWED, size) if followed else 0.0)
            return
        way, pace = way_of(batch, bucket, followed=followed), self._paces[size]
        if way.width > 1:
            self.costs.take(way, size, seconds)
            pace.drafted()
            self.allowance.settle(size, drawn / rows - self.costs.ratio(way, size))
            return
        asked = spent / self.costs.seconds(size) if spent else 0.0
        if asked:
            (self.allowance if pace.drafting else self.asking).settle(size, -asked)
        if steady and asked < DEAR:
            self.costs.take(way, size, seconds)
        if self._since.waited and not steady:  # a steady one was launched before drafts were thought of
            self._since.waited = False
            self.costs.take(ALONE, size, seconds)
            pace.returned()
            self.allowance.settle(size, -self.costs.more(ALONE, size))
        if way == FOLLOWED:
            self.allowance.settle(size, -self.costs.more(FOLLOWED, size))
        for account in (self.allowance, self.asking):
            account.earn(size)
        pace.plain(steady=steady)

    def forget(self, key: Key) -> None:
        """A sequence has ended."""
        self.history.forget(key)
        self._about.forget(key)
        for proposer in self.proposers:
            proposer.forget(key)

    def _size(self, rows: int) -> int:
        """The rows of the plain program for so many: what is known of one number holds for its neighbours."""
        return self.costs.size(PLAIN, -(-rows // self.replicas))

    def _guesses(self, candidate: Candidate) -> list[Guess]:
        """What each proposer says. What it says about a text whose last token is still on its way can be used if the text goes on as
        guessed."""
        sequence = candidate.sequence
        key, found = sequence.request.key, []
        thought = self._about.thoughts.pop(key, None)
        if thought is not None and len(sequence.tokens) > thought.length:
            came = sequence.tokens[thought.length : thought.length + len(thought.proposal.tokens)]
            self.history.take(key, thought.proposal.kind, _common(came, thought.proposal.tokens), len(came))
        for proposer in self.proposers:
            if proposer.DEVICE and (not candidate.hidden or key in self._about.lost):
                continue
            proposal = proposer.propose(sequence, self.drafts)
            if proposal is not None and not proposer.DEVICE:
                proposal = proposal._replace(tokens=checked(proposal.tokens, self.vocab))
            if proposal is None or not proposal.tokens:
                continue
            chance = self.history.chance(key, proposal.kind)
            found.append(Guess(proposal, chance, chance if sequence.pending and not proposer.DEVICE else 1.0))
            if not proposer.DEVICE:
                self._about.thoughts[key] = Thought(len(sequence.tokens), proposal)
        return found

    def _plan(self, found: Mapping[Key, list[Guess]], size: int, rows: int) -> Plan | None:
        """The step with drafts that promises most, if it is to be made."""
        plans = [plan for way in self.costs.ways if (plan := self._planned(way, found, size, rows)) is not None]
        if self.always:
            return max(plans, key=lambda plan: plan.tokens, default=None)
        best, pace = max(plans, key=lambda plan: plan.promise, default=None), self._paces[size]
        believed = best is not None and best.promise > MARGIN and self.allowance.believes(size)
        pace.asked(believed=believed)
        if best is None:
            return None
        if believed:
            if pace.age >= min(pace.until, FRESH if best.promise > SURE else NEAR):
                pace.looks, pace.until = AGAIN, min(2 * pace.until, FRESH)
            return None if pace.looks else best
        return best if pace.apart >= APART and self.allowance.affords(size, best.cost - 1) else None

    def _planned(self, way: Way, found: Mapping[Key, list[Guess]], size: int, rows: int) -> Plan | None:
        """Drafts for one way to run the step; None where nobody has any that need it."""
        most, chosen, expected = way.width - 1, dict[Key, Guess](), 0.0
        for key, guesses in found.items():
            value = 0.0
            for guess in guesses:
                if (way.hidden or not guess.hidden) and (own := guess.worth(most)) > value:
                    chosen[key], value = guess, own
            expected += value
        if not chosen or (way.hidden and not any(guess.hidden for guess in chosen.values())):
            return None
        pace = self._paces[size]
        waiting = 0.0 if way.hidden and self.unseen else self.costs.more(ALONE, size) * min(pace.returns / pace.wide, MOST_RETURNS)
        return Plan(way, chosen, 1 + expected / rows, self.costs.ratio(way, size) + waiting)


def _common(came: Sequence[int], said: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    return next((place for place, (one, other) in enumerate(zip(came, said, strict=False)) if one != other), len(came))


def unseen(settings: SpeculationConfig) -> bool:
    """Whether all drafts are made on the device: then the next step need not wait until it is known which of a step's stand."""
    found = proposers(settings.speculate, model=True, head=True) if settings.speculate != "off" else []
    return bool(found) and all(proposer.DEVICE for proposer in found)


def make(settings: SpeculationConfig, program: ProgramConfig, costs: Costs, metrics: EngineMetrics) -> Speculator | None:
    """The speculator of an engine; None where speculation is off."""
    if settings.speculate == "off":
        return None
    found = proposers(settings.speculate, model=program.draft is not None, head=program.draft is not None and bool(program.draft.tapped))
    return Speculator(found, settings.drafts, program.vocab, program.pool.replicas, costs, metrics, unseen=unseen(settings))


def proposers(kind: str, *, model: bool, head: bool = False) -> list[Proposer]:
    """Those of a setting: "lookup", "draft", "eagle" or "auto" (lookup, and the draft model or head if there is one)."""
    found: list[Proposer] = []
    if kind not in ("draft", "eagle"):
        found.append(LookupProposer())
    if kind != "lookup" and model:
        found.append(EagleProposer() if head else DraftProposer())
    return found

