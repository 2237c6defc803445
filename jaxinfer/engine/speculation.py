"""Who gets drafts in the next step, how many, and whether anybody does: only where they are likely to pay.

For every sequence that decodes, each proposer is asked; of what they say, the guess with the best history is taken, as far as its drafts
are likely enough to stand. Drafts make a step wider for all its rows, so the question is one for the whole step: for each width that there
is a program for, the tokens to be expected per second with drafts against those without, by the history of acceptance and the costs of
steps at this number of rows. What was said and not used is compared with what came, so a history is known where nothing is drafted.

Everything that is done for drafts is charged to them: wide steps, the wait of a plain step behind one whose drafts came from the text, the
time that asking takes, a draft model that keeps up. Where they do not pay, nobody is asked more often than an allowance permits
(`allowance.py`), and the draft model is left out: sequences that it has lost sight of get drafts from their texts alone. Where they do,
enough steps without are made once in a while that the last of them lie far from drafts, so that their cost is known too. This file does not
know how drafts are verified.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxinfer.batch import Batch, Row
from jaxinfer.config import SpeculationConfig
from jaxinfer.engine.allowance import Allowance
from jaxinfer.engine.costs import ALONE, FOLLOWED, HELD_UP, PLAIN, Costs, Seen, Way
from jaxinfer.engine.guesses import Candidate, Guess, Plan
from jaxinfer.engine.history import History, enough
from jaxinfer.engine.metrics import EngineMetrics
from jaxinfer.engine.pace import APART, PUT_OFF, Pace
from jaxinfer.engine.proposers.draft import DraftProposer
from jaxinfer.engine.proposers.eagle import EagleProposer
from jaxinfer.engine.proposers.lookup import LookupProposer
from jaxinfer.engine.proposers.proposal import Proposer, checked
from jaxinfer.engine.resting import Rest
from jaxinfer.engine.sequence import Key
from jaxinfer.engine.thoughts import Sequences, Thought, common

MARGIN = 1.08  # what drafts must promise: their worth and what steps cost are estimates
GOES_ON = 1.04  # and those that others came before: to stop costs plain steps that are slower
AFFORDED = 0.97  # and these while the account holds no less than it began with
WAITED = 2  # steady steps that may end before one that had to wait for drafts does; where nothing overlaps, none ever does
FRESH, LOOK = 512, APART + 5  # after so many steps with drafts, at first fewer, plain ones are made, to see what these cost now
SURE, NEAR = 1.2, 128  # where drafts promise less than so much, or are slower by as much than they were, after so many at most
ENTER = 5  # and behind the first that a draft model sees again, to see what that takes
MOST_RETURNS = 3.0  # for one step with drafts, as far as that is believed
SAVED, SPARED = 5.0, 2.5  # plain steps saved up with which a draft model that was left out keeps up again, and down to how many
ASKING = 0.002  # of a plain step is what each plain step earns for being asked where drafts do not pay


class Bounds(NamedTuple):
    """Drafts of a row at most, token ids, and replicas, each with rows of its own."""

    drafts: int
    vocab: int
    replicas: int


@dataclass
class _Since:
    """Since the last step ended. seconds: that asking took. reading: there is more to read. wanted: drafts were thought worth making; what
    launching them took meanwhile, or waiting for them, is theirs. owed: seconds of the last step that are due to this one for that. blind:
    nobody knows how many are. waited: drafts were wanted that a step had to be awaited for, and no plain step has been launched since that
    had to wait: how many may end that had not."""

    seconds: float = 0.0
    reading: bool = False
    wanted: bool = False
    owed: float = 0.0
    blind: bool = False
    waited: int = 0


@dataclass
class Speculator:
    """Decides for an engine. always: as many drafts as there are, whatever they cost (tests, selftests, benchmarks). unseen: steps with
    drafts are launched behind others, as plain ones are. clock: seconds. rest: steps that an engine need not ask or tell about, if any."""

    proposers: Sequence[Proposer]
    bounds: Bounds
    costs: Costs
    metrics: EngineMetrics
    always: bool = False
    unseen: bool = False
    clock: Callable[[], float] = time.perf_counter
    history: History = field(default_factory=History)
    allowance: Allowance = field(init=False)
    asking: Allowance = field(default_factory=lambda: Allowance(ASKING, 0.0, 4.0))
    rest: Rest | None = None
    _prompts: bool = False
    _about: Sequences = field(default_factory=Sequences)
    _paces: defaultdict[int, Pace] = field(default_factory=lambda: defaultdict(Pace))
    _since: _Since = field(default_factory=_Since)

    def __post_init__(self) -> None:
        self.allowance = Allowance(plain=lambda size: self.costs.seconds(size))

    def asks(self, rows: int) -> bool:
        """Whether the next step of so many rows may have drafts; False takes no time. Where drafts do not pay a `rest` may begin."""
        self.wake()
        size = self._size(rows)
        pace, known = self._paces[size], self.costs.known(size)
        may = (pace.curious or not self._may_rest(pace)) and self.asking.affords(size, 0.0)
        put_off = pace.puts_off(behind=self._prompts, may=may)
        wanted = not pace.looks and (pace.drafting or (may and not put_off))
        entering = pace.drafting and pace.out  # the draft model keeps up first
        found = self.always or (wanted and not entering and known)
        if not found and not put_off and known and self._may_rest(pace):
            span, after = self.costs.span(size, self.bounds.replicas), pace.prompts_after if self._follows else None
            self.rest = Rest(size, span, pace.rest, after, clock=self.clock)
        return found

    @property
    def _follows(self) -> bool:
        return any(proposer.DEVICE for proposer in self.proposers)

    def _may_rest(self, pace: Pace) -> bool:
        since, followed = self._since, not pace.out and self._follows
        calm = not pace.drafting and not pace.looks and pace.apart > APART  # what the last drafts cost is settled
        return calm and not (followed or since.seconds or since.wanted or since.waited or since.owed)

    def sees(self, batch: Batch) -> None:
        """A step is launched that belongs to no rest: what comes behind prompts is treated apart."""
        self.wake()
        self._prompts = bool(batch.prefills)
        self.enter(batch)

    def enter(self, batch: Batch) -> None:
        """Sequences enter with a step, of a rest or not."""
        self._about.begin(batch)

    def wake(self) -> None:
        """End a rest: its steps are taken in, all at once."""
        rest, self.rest = self.rest, None
        if rest is None:
            return
        rest.over, self._prompts = True, rest.behind
        self._about.lose()
        if rest.seconds:
            self.costs.rested(rest.size, rest.seconds)
        self._paces[rest.size].rested(rest.plain, missed=rest.due, told=rest.seconds > 0)
        self.allowance.earn(rest.size, rest.plain)
        self.asking.earn(rest.size, rest.plain)

    def propose(self, candidates: Sequence[Candidate]) -> dict[Key, tuple[int, ...]]:
        """The drafts of the next step by sequence; {} where it is better to have none."""
        rows, begun = len(candidates), self.clock()
        size = self._size(rows)
        if not (self.always or self.costs.known(size)):  # some have ended since it was decided to ask
            return {}
        came = [self._came(candidate) for candidate in candidates]
        self._paces[size].compared(right=2 * came.count(True) > len(came) - came.count(None))
        plan = self._plan({candidate.sequence.request.key: self._guesses(candidate) for candidate in candidates}, size, rows)
        if any([proposer.rest() for proposer in self.proposers]):
            self._since.reading = True
            self._paces[size].reading()
        self._since.seconds += self.clock() - begun
        if plan is None:
            return {}
        self._since.wanted, self._since.waited = True, 0 if self.unseen else WAITED
        self._about.kinds = {key: guess.proposal.kind for key, guess in plan.guesses.items()}
        if not any(candidate.sequence.pending for candidate in candidates):  # else texts are asked again when that has come
            self._about.use(plan.guesses)
        most = plan.way.width - 1
        counts = {key: most if self.always else min(most, enough(guess.chance)) for key, guess in plan.guesses.items()}
        return {key: guess.proposal.tokens[: counts[key]] for key, guess in plan.guesses.items()}

    def leaves_out(self, batch: Batch) -> bool:
        """Whether the draft model stays out of a step, whose tokens it has not seen then."""
        if self.always or batch.decode_tokens > 1:
            return False
        if not self._follows:
            return True
        size = self._size(len(batch.rows))
        pace = self._paces[size]
        if self._keeps_up(batch, size, pace):
            if pace.out and not batch.prefills:
                pace.enter(ENTER)
            pace.out = False
            return False
        pace.out = True
        self._about.miss(batch)
        return True

    def _keeps_up(self, batch: Batch, size: int, pace: Pace) -> bool:
        """Whether the draft model is to see a step without drafts."""
        if pace.is_bare and not batch.prefills and all(self._about.gone(row.request.key) < ENTER for row in batch.rows):
            return False  # once for each sequence
        known = bool(batch.prefills) or self.costs.known(size)  # a few steps show what plain ones take
        pace.drafting &= self.allowance.believes(size)
        least = SAVED if pace.out else SPARED
        saved = self.allowance.balance(size) >= least
        return known and (pace.drafting or (saved and not all(self._about.lost(row.request.key) for row in batch.rows)))

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

    def observe(self, step: Seen) -> None:
        """Take in a step."""
        since, size = self._since, self._size(step.rows)
        pace = self._paces[size]
        unknown = bool(step.batch.prefills) or not step.seconds
        self._since = _Since(waited=max(0, since.waited - step.steady), blind=self.unseen and since.wanted and unknown)
        if since.seconds:
            asked = since.seconds / self.costs.seconds(size)
            account = self.allowance if pace.drafting and not since.reading else self.asking  # reading does not hold up what it is for
            account.charge(size, min(asked, HELD_UP))
        if not step.seconds:
            return
        if step.batch.prefills:
            self._mixed(step, size)
        elif step.way.width == 1:
            self._plain(step, size, since)
        else:
            self._wide(step, size, since)

    def _wide(self, step: Seen, size: int, since: _Since) -> None:
        """Take in a step with drafts."""
        pace = self._paces[size]
        took = max(0.0, step.seconds - since.seconds + since.owed)
        if since.blind:
            took = max(took, self.costs.ratio(step.way, size) * self.costs.seconds(size))
        else:
            took = self.costs.take(step.way, size, took, far=pace.apart >= APART)
        self._owe(step.way, size, took, step.drawn / step.rows)
        pace.drafted()

    def _mixed(self, step: Seen, size: int) -> None:
        """Take in a step with prompts: the draft model's part of it is charged, and that it had to wait for one with drafts."""
        if step.followed:
            more = self.costs.more(FOLLOWED, size)
            self.allowance.charge(size, more / (1 + more) * step.seconds / self.costs.seconds(size))
        if self._since.waited and not step.steady:
            self._since.waited = 0
            self._paces[size].excursions.returned()
            self.allowance.charge(size, self.costs.more(ALONE, size))

    def _plain(self, step: Seen, size: int, since: _Since) -> None:
        """Take in a step without drafts."""
        pace, way, took = self._paces[size], step.way, step.seconds - since.seconds
        waited = since.waited > 0 and not step.steady  # a steady one was launched before drafts were thought of
        if waited:
            self._since.waited, way, took = 0, ALONE, took + since.owed
            pace.excursions.returned()
        elif since.wanted and self.costs.known(size):
            usual = self.costs.seconds(size) * (1 + self.costs.more(way, size))
            self._since.owed, took = took - usual, usual
        pace.plain(steady=step.steady)
        comparable = step.alike and (waited or (step.steady and not since.wanted))
        if comparable:
            took = self._compare(way, size, took)
        if waited or pace.apart <= APART:  # all until a rest may begin: they are slower for the drafts before
            self._owe(way, size, took, 1.0)
        elif way == FOLLOWED:
            self.allowance.charge(size, self.costs.more(FOLLOWED, size))
        if comparable:
            self._settle(size)
        self.allowance.earn(size)
        self.asking.earn(size)

    def _compare(self, way: Way, size: int, seconds: float) -> float:
        """Note what a plain step took, unless drafts do not pay and the last rest told that. What is to be charged for it."""
        pace = self._paces[size]
        if pace.told and not pace.drafting and way == PLAIN and self.costs.known(size):
            return seconds
        return self.costs.take(way, size, seconds, far=pace.apart >= APART)

    def _settle(self, size: int) -> None:
        """Where drafts lie far back, settle what they cost; what they gained is spent once, on asking for more first."""
        pace = self._paces[size]
        if pace.apart > APART and not pace.looks and (gain := self.allowance.settle(size)):
            spent = max(0.0, min(gain, self.asking.most - self.asking.balance(size)))
            self.asking.charge(size, -spent)
            self.allowance.charge(size, spent)
            pace.gained()

    def _owe(self, way: Way, size: int, seconds: float, tokens: float) -> None:
        """Account for what a step took beyond what its tokens cost without drafts: by the clock, whatever is believed of its kind."""
        most = HELD_UP * self.costs.seconds(size) * (1 + self.costs.more(way, size))
        self.allowance.owe(size, min(seconds, most), tokens, near=way.width == 1)

    def forget(self, key: Key) -> None:
        """A sequence has ended."""
        self.history.forget(key)
        self._about.forget(key)
        for proposer in self.proposers:
            proposer.forget(key)

    def _size(self, rows: int) -> int:
        """The rows of the plain program for so many: what is known of one number holds for its neighbours."""
        return self.costs.size(PLAIN, -(-rows // self.bounds.replicas))

    def _came(self, candidate: Candidate) -> bool | None:
        """Compare what was said of a text and not used with what came; whether all of it did. None: there is nothing to compare."""
        tokens, key = candidate.sequence.tokens, candidate.sequence.request.key
        thought = self._about.thoughts.pop(key, None)
        if thought is None or len(tokens) <= thought.length:
            return None
        came = tokens[thought.length : thought.length + len(thought.proposal.tokens)]
        right = common(came, thought.proposal.tokens)
        self.history.take(key, thought.proposal.kind, right, len(came))
        return right == len(came)

    def _guesses(self, candidate: Candidate) -> list[Guess]:
        """What each proposer says. What it says about a text whose last token is still on its way can be used if the text goes on as
        guessed."""
        sequence = candidate.sequence
        key, found = sequence.request.key, []
        for proposer in self.proposers:
            if proposer.DEVICE and (not candidate.hidden or self._about.lost(key)):
                continue
            proposal = proposer.propose(sequence, self.bounds.drafts)
            if proposal is not None and not proposer.DEVICE:
                proposal = proposal._replace(tokens=checked(proposal.tokens, self.bounds.vocab))
            if proposal is None or not proposal.tokens:
                continue
            chance = self.history.chance(key, proposal.kind, proposer.HOPED)
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
        promising = best is not None and best.promise > self._needed(pace, size)
        believed = promising and self.allowance.believes(size)
        pace.asked(believed=believed)
        if best is None:
            return None
        if promising and self.allowance.doubts(size):
            pace.look(LOOK, pace.until)
            return None
        if believed:
            sure = best.promise > SURE > self.costs.turned(size)
            if pace.age >= min(pace.until, FRESH if sure else NEAR):
                pace.look(LOOK, FRESH)
                self.allowance.look(size)
            return None if pace.looks else best
        return best if self._may_try(pace) and self.allowance.affords(size, best.cost - 1) else None

    def _needed(self, pace: Pace, size: int) -> float:
        """What drafts must promise."""
        if pace.apart >= APART:
            return MARGIN
        return AFFORDED if self.allowance.affords(size, 0.0) else GOES_ON

    def _may_try(self, pace: Pace) -> bool:
        """Whether a trial's cost would show: behind prompts nothing says what launching drafts takes. It is not put off for ever."""
        return pace.apart > APART and not (self._prompts and pace.put_off < PUT_OFF)

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
        waiting = 0.0 if way.hidden and self.unseen else self.costs.more(ALONE, size) * min(pace.excursions.waiting, MOST_RETURNS)
        return Plan(way, chosen, 1 + expected / rows, self.costs.ratio(way, size) + waiting)


def unseen(settings: SpeculationConfig) -> bool:
    """Whether all drafts are made on the device: then the next step need not wait until it is known which of a step's stand."""
    found = proposers(settings.speculate, model=True, head=True) if settings.speculate != "off" else []
    return bool(found) and all(proposer.DEVICE for proposer in found)


def proposers(kind: str, *, model: bool, head: bool = False) -> list[Proposer]:
    """Those of a setting: "lookup", "draft", "eagle" or "auto" (lookup, and the draft model or head if there is one)."""
    found: list[Proposer] = []
    if kind not in ("draft", "eagle"):
        found.append(LookupProposer())
    if kind != "lookup" and model:
        found.append(EagleProposer() if head else DraftProposer())
    return found
