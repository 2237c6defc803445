"""The one generation loop: schedule a batch, launch it on the devices, commit what the one before produced.

`add` checks a request against the model and puts it in line; each `step` moves every running sequence on and returns what became final;
`generate()` and the server drive the same engine. Exactly one thread calls an engine. While the devices compute one step the host commits
the one before: drawn tokens stay on the device, in their slots, where the next step finds them. With `overlap` off each step is committed
before the next is scheduled; the tokens are the same. With drafts (`speculation.py`) a step may give a sequence several tokens, and as
how many there are decides where it goes on, it is committed before the next is scheduled, unless the device makes all drafts itself
(`Row.unsettled`). Each request has a wall around it: what goes wrong in its own text or numbers ends that request alone. This file does
not know how arrays look or where requests come from.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt32

from jaxinfer.batch import DRAFTED, Admission, Batch
from jaxinfer.config import EngineConfig
from jaxinfer.engine import words
from jaxinfer.engine.drawn import Drawn, fetch
from jaxinfer.engine.grammar import Grammars, Matcher, masks
from jaxinfer.engine.grammar_compile import GrammarProblem
from jaxinfer.engine.longest import limit_of
from jaxinfer.engine.metrics import EngineMetrics, StepRecord
from jaxinfer.engine.resting import Rest
from jaxinfer.engine.scheduler import Key, Sequence
from jaxinfer.engine.scores import PromptScores
from jaxinfer.engine.setup import SAMPLING_DEFAULTS, EngineInfo, Progress, build, make_speculator
from jaxinfer.engine.speculation import Candidate, Seen, Speculator
from jaxinfer.engine.text import OutputText
from jaxinfer.request import FinishReason, Output, QueueFull, Request, RequestError, SamplingParams, joined
from jaxinfer.sampling import IMPOSSIBLE, NOT_FINITE, Sampled
from jaxinfer.step.forward import Computed, Demand
from jaxinfer.step.inputs import Packed, pack
from jaxinfer.step.score import Scored, places
from jaxinfer.step.slots import Draws
from jaxinfer.step.verify import Verified

logger = logging.getLogger(__name__)

__all__ = ["Engine", "EngineInfo", "Progress"]


@dataclass
class _Active:
    """A request inside the engine: its place in the scheduler, its text, how many tokens it may produce, how they are drawn."""

    sequence: Sequence
    text: OutputText
    limit: int
    draws: Draws
    demand: Demand
    matcher: Matcher | None = None
    scores: PromptScores | None = None
    counted: bool = True


@dataclass
class _Flight:
    """A batch on the devices, not committed yet. computed: None once its tokens are being drawn, so that the memory is free for the next
    step; steady: behind another; alone: without a draft model; sampled: None until that begins."""

    batch: Batch
    packed: Packed
    computed: Computed | None
    begun: float
    host_gap: float
    steady: bool
    alone: bool = False
    rest: Rest | None = None
    scored: Scored | None = None
    sampled: Sampled | Verified | None = None

    @property
    def done(self) -> bool:
        """Whether its tokens can be read without waiting."""
        if self.sampled is None:
            return True
        drawn = self.sampled.drawn if isinstance(self.sampled, Verified) else self.sampled
        return drawn.told.is_ready()


class Engine:
    """Loads and compiles a model when it is made; ready afterwards.

    Attributes: config, tokenizer (None only for random weights without one), info, defaults (sampling), metrics, last_packed (the batch
    launched last), grammars (compile one there before its request is added, if `add` must not wait for it).

    Raises:
        ConfigError, CheckpointError, TokenizerError: the model cannot be run as asked, with what to do about it.
    """

    def __init__(self, config: EngineConfig, *, progress: Progress | None = None) -> None:
        built = build(config, progress or (lambda stage, done, total: None))
        self.config = config = built.config
        self.tokenizer = built.tokenizer
        self.info = built.info
        self.defaults: dict[str, Any] = {name: getattr(SamplingParams(), name) for name in SAMPLING_DEFAULTS} | built.defaults
        self.metrics = EngineMetrics(compile_seconds=built.program.compile_seconds)
        self.scheduler = built.scheduler
        self.program = built.program
        self.grammars = Grammars(built.tokenizer, built.program.config.vocab)
        self.last_packed: Packed | None = None
        self._active: dict[Key, _Active] = {}
        self._pending: list[Output] = []
        self._flights: deque[_Flight] = deque()
        self._depth = 1 if config.execution.overlap == "on" else 0  # flights that may stay in the air when a step returns
        self._idle_since = 0.0
        self._rest: Rest | None = None  # of the steps that are launched now
        self.speculator = make_speculator(config.speculation, built.program.config, built.costs, self.metrics)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._active or self._pending or self._flights)

    def add(self, request: Request, *, counted: bool = True) -> None:
        """Put one sequence (`n` = 1; see `request.choices`) in line. Not `counted`: no traffic, finds and leaves no cached pages.

        Raises:
            RequestError: it can never run (too long, a token outside the vocabulary, a bad grammar). QueueFull: too many wait already.
        """
        limit = self._limit(request)
        if self.scheduler.waiting >= self.config.scheduler.max_waiting:
            raise QueueFull(f"{self.scheduler.waiting} requests are waiting already; try again later")
        detokenizer = self.tokenizer.stream(skip_special=request.params.skip_special_tokens) if self.tokenizer else None
        text = OutputText(detokenizer, request.params.stop)
        params = request.params
        matcher = None if params.grammar is None else self.grammars.matcher(params.grammar)
        scores = None if params.prompt_logprobs is None else PromptScores(request)
        draws, demand = self._draws(params), Demand.of(params)
        sequence = self.scheduler.add(request, limit)  # last: nothing after it can refuse
        sequence.chain.poisoned = sequence.chain.closed = not counted
        self._active[request.key] = _Active(sequence, text, limit, draws, demand, matcher, scores, counted)
        self.metrics.prompt_tokens += len(request.prompt) * counted
        self._gauge()

    def abort(self, request_id: str) -> None:
        """End every sequence of a request and free what it holds; an id that is not here is ignored."""
        for sequence in self.scheduler.find(request_id):
            self._pending.append(self._end(self._active[sequence.request.key], FinishReason.ABORT))
        self._gauge()

    def step(self) -> list[Output]:
        """Schedule one batch, launch it on the devices, commit what the one before produced; [] when nothing became final."""
        outputs, drafts = ([], {}) if self.speculator is None or self._rest is not None else self._propose()
        batch = self.scheduler.schedule(drafts)
        flight = None if batch is None else self._launch(batch)
        outputs, self._pending = outputs + self._pending, []
        if flight is not None:
            self._flights.append(flight)
            guided = any(row.samples and row.request.params.grammar is not None for _, row in flight.packed.rows)
            if guided:
                outputs += self._land(1)  # what a grammar allows depends on every token before; the devices compute meanwhile
            draw = self.program.verify if flight.packed.shapes.bucket.decode_tokens > 1 else self.program.sample
            flight.sampled = draw(flight.computed, self._demand(flight.packed), self._masks(flight.packed) if guided else None)
            flight.computed = None
        outputs += self._land(0 if flight is None else self._depth)
        self._gauge()
        return outputs

    def run(self) -> Iterator[Output]:
        """Step until nothing is left, yielding outputs as they come."""
        while self.has_work:
            yield from self.step()

    def shutdown(self) -> None:
        """Forget all requests; the engine must not be used afterwards."""
        for key in list(self._active):
            self.abort(key[0])
        self._land(0)
        self._pending.clear()
        self.grammars.close()

    def _demand(self, packed: Packed) -> Demand:
        """The most that any of the rows asks of the sampler."""
        found = (self._active.get(row.request.key) for _, row in packed.rows if row.samples)
        return max((active.demand for active in found if active is not None), default=Demand.GREEDY)

    def _masks(self, packed: Packed) -> UInt32[np.ndarray, "rows words"] | None:
        """What the rows' grammars allow next, from the tokens that are known now; None if no row has one."""
        bucket, matchers = packed.shapes.bucket, {}
        for index, row in packed.rows:
            active = self._active.get(row.request.key) if row.samples else None
            if active is not None and active.matcher is not None:
                matchers[index] = active.matcher, row.tokens[1:] if bucket.decode_tokens > 1 else ()
        return masks(matchers, (bucket.rows * packed.shapes.replicas, bucket.decode_tokens), self.program.config.vocab)

    def _propose(self) -> tuple[list[Output], dict[Key, tuple[int, ...]]]:
        """The drafts of the next step. While a step is on its way they are guessed from what is known; if they seem to be worth it and come
        from the text, that step is committed first and they are guessed again."""
        wide = any(flight.batch.decode_tokens > 1 for flight in self._flights)
        outputs = self._land(0) if wide and not self.scheduler.limits.unsettled else []
        drafts = self._guess()
        if self._flights and any(DRAFTED not in tokens for tokens in drafts.values()):
            outputs += self._land(0)
            drafts = self._guess(asked=True)
        return outputs, drafts

    def _guess(self, *, asked: bool = False) -> dict[Key, tuple[int, ...]]:
        if self.speculator is None or not self.scheduler.running:
            return {}
        if not asked and not self.speculator.asks(self.scheduler.running):
            self._rest = self.speculator.rest
            return {}
        candidates = [Candidate(running, self._active[running.request.key].matcher is None) for running in self.scheduler.decoding]
        return self.speculator.propose(candidates) if candidates else {}

    def _launch(self, batch: Batch) -> _Flight:
        """Send a batch on its way: pages copied, slots written, then the forward pass."""
        begun = time.perf_counter()
        self.program.copy_pages([(copy.replica, copy.source, copy.target) for copy in batch.copies])
        for admission in batch.admissions:
            self._admit(admission)
        self.last_packed = packed = pack(batch, self.program.config.bucket_for(batch))
        idle = all(flight.done for flight in self._flights)
        rest = None if self.speculator is None else self._resting(self.speculator, batch)
        alone = rest is not None or (self.speculator is not None and self.speculator.leaves_out(batch))
        computed = self.program.forward(packed, self._demand(packed) if batch.hidden else None, alone=alone)
        gap = time.perf_counter() - self._idle_since if idle and self._idle_since else 0.0
        steady = bool(self._flights) or not self._depth
        return _Flight(batch, packed, computed, begun, gap, steady, alone, rest, self.program.score(packed, computed))

    def _resting(self, speculator: Speculator, batch: Batch) -> Rest | None:
        """The rest that a step belongs to; the speculator hears of others, and of sequences that enter."""
        rest = self._rest
        if rest is not None and rest.takes(batch):
            if batch.admissions:
                speculator.enter(batch)
            self._rest = None if rest.due else rest
            return rest
        self._rest = None
        speculator.sees(batch)
        return None

    def _land(self, left: int) -> list[Output]:
        """Commit the oldest flights until so many are left."""
        outputs = []
        while len(self._flights) > left:
            outputs += self._commit(self._flights.popleft())
        return outputs

    def _commit(self, flight: _Flight) -> list[Output]:
        """Fetch what a flight drew and move its sequences on: append tokens, end what is finished, emit."""
        self._take_scores(flight)
        if flight.sampled is None:
            raise RuntimeError("a flight is committed whose sampler was not launched")
        rows, drawn = flight.packed.rows, fetch(flight.packed, flight.sampled)
        counts = [len(drawn.get(index, ())) for index, _ in rows]
        sequences = self.scheduler.commit(flight.batch, counts)
        if self.speculator is not None and flight.batch.decode_tokens > 1:
            drew = zip(rows, counts, sequences, strict=True)
            self.speculator.learn((row, count) for (_, row), count, running in drew if running is not None)
        outputs = []
        for (index, row), sequence in zip(rows, sequences, strict=True):
            if row.samples and sequence is not None:
                outputs.append(self._advance_by(self._active[row.request.key], drawn[index]))
        self._measure(flight, sum(counts))
        return outputs

    def _advance_by(self, active: _Active, drawn: list[Drawn]) -> Output:
        """What a step drew for one sequence, up to where it ends, as one delta."""
        output = self._advance(active, drawn[0])
        for item in drawn[1:]:
            if output.finish_reason is not None:
                break
            output = joined(output, self._advance(active, item))
        return output

    def _take_scores(self, flight: _Flight) -> None:
        if flight.scored is None:
            return
        scored = jax.device_get(flight.scored)
        for row, at in places(flight.packed):
            active = self._active.get(row.request.key)
            if active is not None and active.scores is not None and active.sequence.request is row.request:
                active.scores.take(row, scored, at)

    def _admit(self, admission: Admission) -> None:
        self.program.admit(admission, self._active[admission.request.key].draws)

    def _draws(self, params: SamplingParams) -> Draws:
        """What the sampler has to know beside the request; refuses rules that leave no token to be drawn."""
        ends = () if params.stop.ignore_eos else self._eos
        held = tuple(dict.fromkeys((*ends, *params.stop.token_ids))) if params.min_tokens else ()
        banned = words.sequences(self.tokenizer, params.bad_words)
        never = {*held, *(sequence[0] for sequence in banned if len(sequence) == 1)}
        if params.allowed_token_ids is not None and never.issuperset(params.allowed_token_ids):
            message = "allowed_token_ids holds only tokens that bad_words or min_tokens exclude; allow one more, or drop the other rule"
            raise RequestError(message, "allowed_token_ids")
        return Draws(secrets.randbits(64) if params.seed is None else params.seed, held, banned)

    def _advance(self, active: _Active, drawn: Drawn) -> Output:
        """One more token for one sequence, inside its own wall."""
        if drawn.token == NOT_FINITE:
            pages = self.scheduler.poison(active.sequence)
            self.program.wipe_pages([(active.sequence.replica, page) for page in pages])  # after all that was launched, before any reuse
            return self._end(active, FinishReason.ERROR, error="the model produced numbers that are not finite for this request")
        if drawn.token == IMPOSSIBLE:
            return self._end(active, FinishReason.ERROR, error="the rules of this request leave no token to be drawn")
        self.scheduler.append(active.sequence, drawn.token)
        self.metrics.generation_tokens += active.counted
        try:
            if active.matcher is not None:
                active.matcher.accept(drawn.token)
            return self._emit(active, drawn)
        except GrammarProblem as error:
            return self._end(active, FinishReason.ERROR, error=str(error))
        except Exception:  # whatever a tokenizer raises must not reach the other requests
            logger.exception("request %s failed while its text was made", active.sequence.request.id)
            return self._end(active, FinishReason.ERROR, error="the text of this request could not be made")

    def _emit(self, active: _Active, drawn: Drawn) -> Output:
        request, count = active.sequence.request, active.sequence.drawn
        params = request.params
        stop_token = self._stops_at(params.stop.token_ids, drawn.token, params.stop.ignore_eos)
        if stop_token and not params.stop.include_in_output:
            piece = active.text.flush()
        else:
            piece = active.text.push(drawn.token, may_stop=count > params.min_tokens)
        text, reason = piece.text, _reason(active, count, stopped=bool(stop_token or piece.stopped_by))
        if reason is not None and piece.stopped_by is None:
            rest = active.text.flush()
            text, piece = text + rest.text, rest
            reason = FinishReason.STOP if rest.stopped_by else reason
        output = Output(
            request.id, request.index, text, (drawn.token,), logprobs=() if drawn.logprob is None else (drawn.logprob,),
            prompt_logprobs=active.scores.entries() if active.scores is not None and count == 1 else (),
            prompt_tokens=len(request.prompt), output_tokens=count,
        )  # fmt: skip
        if reason is None:
            return output
        stop_reason = piece.stopped_by or (drawn.token if stop_token and drawn.token in params.stop.token_ids else None)
        self._forget(active, reason)
        return replace(output, finish_reason=reason, stop_reason=stop_reason)

    def _stops_at(self, stop_ids: tuple[int, ...], token: int, ignore_eos: bool) -> bool:
        return token in stop_ids or (not ignore_eos and token in self._eos)

    @property
    def _eos(self) -> tuple[int, ...]:
        return self.tokenizer.eos_ids if self.tokenizer else ()

    def _end(self, active: _Active, reason: FinishReason, error: str | None = None) -> Output:
        request, count = active.sequence.request, active.sequence.drawn
        output = Output(
            request.id, request.index, finish_reason=reason, prompt_tokens=len(request.prompt), output_tokens=count, error=error
        )
        self._forget(active, reason)
        return output

    def _forget(self, active: _Active, reason: FinishReason) -> None:
        self.scheduler.finish(active.sequence)
        if self.speculator is not None:
            self.speculator.forget(active.sequence.request.key)
        del self._active[active.sequence.request.key]
        self.metrics.finished[reason.value] += active.counted

    def _limit(self, request: Request) -> int:
        if request.key in self._active:
            raise RequestError("a request with this id is running already", "id")
        return limit_of(request, longest=self.info.max_model_len, vocab=self.program.config.vocab)

    def _measure(self, flight: _Flight, drawn: int) -> None:
        now, since, shapes, batch = time.perf_counter(), self._idle_since, flight.packed.shapes, flight.batch
        padded, phase = shapes.bucket.tokens * shapes.replicas, "mixed" if batch.prefills else "decode"
        if self.speculator is not None and (flight.rest is None or flight.rest.over):
            followed, this = not (flight.alone or self.program.config.draft is None), (shapes.bucket, flight.alone)
            ahead = next(((later.packed.shapes.bucket, later.alone) for later in self._flights), None if self._depth else this)
            self.speculator.observe(Seen(batch, shapes.bucket, since and now - since, drawn, flight.steady, followed, ahead == this))
        self.metrics.record(StepRecord(phase, now - max(flight.begun, since), flight.host_gap, batch.tokens, padded))
        self._idle_since = now if self._active else 0.0  # waiting for work is no gap

    def _gauge(self) -> None:
        hidden = [active.sequence.running for active in self._active.values() if not active.counted]
        self.metrics.running = self.scheduler.running - sum(hidden)
        self.metrics.waiting = self.scheduler.waiting - hidden.count(False)
        self.metrics.kv_usage, self.metrics.preemptions = self.scheduler.usage, self.scheduler.preemptions


def _reason(active: _Active, count: int, *, stopped: bool) -> FinishReason | None:
    """Why a sequence ends with the token that it just got, its `count`th, if it does."""
    if stopped or (active.matcher is not None and active.matcher.finished):
        return FinishReason.STOP
    return FinishReason.LENGTH if count >= active.limit else None
