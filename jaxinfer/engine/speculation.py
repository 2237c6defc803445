"""Who gets drafts in the next step, and whether anybody does: only where they are likely to pay.

For every sequence that decodes, each proposer is asked; of what they say, the guess with the best history is taken. Drafts make a step
wider for all its rows, so the question is one for the whole step: tokens to be expected per second with drafts against tokens per second
without, by the history of acceptance and the costs of steps. Where drafts do not pay, they are tried once in a while all the same, so
seldom that it costs at most `PROBE` of the time. This file does not know how drafts are verified.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxinfer.batch import DRAFTED, Batch, Row
from jaxinfer.config import SpeculationConfig
from jaxinfer.engine.costs import MODEL, PLAIN, WIDE, Costs
from jaxinfer.engine.history import History
from jaxinfer.engine.metrics import EngineMetrics
from jaxinfer.engine.proposers.draft import DraftProposer
from jaxinfer.engine.proposers.eagle import EagleProposer
from jaxinfer.engine.proposers.lookup import LookupProposer
from jaxinfer.engine.proposers.proposal import Proposal, Proposer, checked
from jaxinfer.engine.sequence import Key
from jaxinfer.engine.sequence import Sequence as Running
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.program import ProgramConfig

MARGIN = 1.02  # what drafts must promise: their worth is an estimate
PROBE = 0.01
SELDOM = 32  # steps without drafts between two trials, at least


class Candidate(NamedTuple):
    """A sequence that decodes in the next step. hidden: whether drafts may be such that the host does not know them."""

    sequence: Running
    hidden: bool = True


class Guess(NamedTuple):
    """A proposal and how many tokens it is likely to give."""

    proposal: Proposal
    worth: float


@dataclass
class Speculator:
    """Decides for an engine. always: draft whenever there is a guess, whatever it costs (tests and selftests)."""

    proposers: Sequence[Proposer]
    drafts: int
    vocab: int
    replicas: int
    costs: Costs
    metrics: EngineMetrics
    always: bool = False
    history: History = field(default_factory=History)
    _kinds: dict[Key, str] = field(default_factory=dict)
    _refused: dict[int, int] = field(default_factory=dict)

    def propose(self, candidates: Sequence[Candidate]) -> dict[Key, tuple[int, ...]]:
        """The drafts of the next step by sequence; {} where it is better to have none."""
        guesses = {candidate.sequence.request.key: self._guesses(candidate) for candidate in candidates}
        for proposer in self.proposers:
            proposer.rest()
        chosen = self._choose(guesses, len(candidates))
        self._kinds = {key: guess.proposal.kind for key, guess in chosen.items()}
        return {key: guess.proposal.tokens for key, guess in chosen.items()}

    def learn(self, rows: Iterable[tuple[Row, int]]) -> None:
        """Take in how many tokens rows with drafts have drawn."""
        for row, count in rows:
            proposed, accepted = len(row.tokens) - 1, count - 1
            if not proposed or accepted < 0:
                continue
            self._refused.clear()
            self.history.take(row.request.key, self._kinds.get(row.request.key, "draft"), accepted, proposed)
            self.metrics.drafts += 1
            self.metrics.draft_tokens += proposed
            self.metrics.accepted_tokens += accepted
            self.metrics.accepted_at.update(range(accepted))

    def observe(self, batch: Batch, bucket: Bucket, seconds: float) -> None:
        """Take in how long a step took, from the end of the one before."""
        if not batch.prefills:
            way = PLAIN if bucket.decode_tokens == 1 else MODEL if batch.hidden else WIDE
            self.costs.take(way, bucket.decode_rows, seconds)

    def forget(self, key: Key) -> None:
        """A sequence has ended."""
        self.history.forget(key)
        for proposer in self.proposers:
            proposer.forget(key)

    def _guesses(self, candidate: Candidate) -> list[Guess]:
        key, found = candidate.sequence.request.key, []
        for proposer in self.proposers:
            if proposer.DEVICE and not candidate.hidden:
                continue
            proposal = proposer.propose(candidate.sequence, self.drafts)
            if proposal is not None and not proposer.DEVICE:
                proposal = proposal._replace(tokens=checked(proposal.tokens, self.vocab))
            if proposal is not None and proposal.tokens:
                found.append(Guess(proposal, self.history.worth(key, proposal.kind, len(proposal.tokens))))
        return found

    def _choose(self, guesses: Mapping[Key, list[Guess]], rows: int) -> dict[Key, Guess]:
        """Drafts from the host alone, or from the device too: whichever gives more tokens per second, if it is more than without."""
        size = -(-rows // self.replicas)
        best, rate, tried = dict[Key, Guess](), 0.0, WIDE
        for way, allowed in ((WIDE, False), (MODEL, True)):
            found = {key: _best(own, allowed) for key, own in guesses.items()}
            chosen = {key: guess for key, guess in found.items() if guess is not None}
            if not chosen or (allowed and not any(DRAFTED in guess.proposal.tokens for guess in chosen.values())):
                continue
            expected = (rows + sum(guess.worth for guess in chosen.values())) / self.costs.get(way, size)
            if expected > rate:
                best, rate, tried = chosen, expected, way
        if not best or self.always or rate > MARGIN * rows / self.costs.get(PLAIN, size) or self._probe(tried, size):
            return best
        return {}

    def _probe(self, way: str, size: int) -> bool:
        """Whether it is time to try drafts although they do not seem to pay: soon, if such a step was never made."""
        self._refused[size] = self._refused.get(size, 0) + 1
        extra = self.costs.get(way, size) / self.costs.get(PLAIN, size) - 1 if self.costs.seen(way, size) else 0.0
        return self._refused[size] > max(SELDOM, extra / PROBE)


def make(settings: SpeculationConfig, program: ProgramConfig, costs: Costs, metrics: EngineMetrics) -> Speculator | None:
    """The speculator of an engine; None where speculation is off."""
    if settings.speculate == "off":
        return None
    found = proposers(settings.speculate, model=program.draft is not None, head=program.draft is not None and bool(program.draft.tapped))
    return Speculator(found, settings.draft_tokens, program.vocab, program.pool.replicas, costs, metrics)


def proposers(kind: str, *, model: bool, head: bool = False) -> list[Proposer]:
    """Those of a setting: "lookup", "draft", "eagle" or "auto" (lookup, and the draft model or head if there is one)."""
    found: list[Proposer] = []
    if kind not in ("draft", "eagle"):
        found.append(LookupProposer())
    if kind != "lookup" and model:
        found.append(EagleProposer() if head else DraftProposer())
    return found


def _best(guesses: Sequence[Guess], allowed: bool) -> Guess | None:
    found = [guess for guess in guesses if allowed or DRAFTED not in guess.proposal.tokens]
    return max(found, key=lambda guess: guess.worth, default=None)
