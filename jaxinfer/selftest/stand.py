"""An engine on the test stand: the same compiled programs behind any schedule, and what every request got.

A selftest row builds one engine (by default of the shape "tiny", random weights, small pages) and puts a fresh scheduler behind it for
each run: other limits, fewer pages, another policy, with or without a prefix cache, overlapping or not. Requests are fed as fast as the
engine takes them; what each got is an `Answer`. A row ends with a `Verdict`. This file does not know what is promised.
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jaxinfer.cache.pages import PagePool
from jaxinfer.cache.prefix import Digest, PrefixIndex, sha256
from jaxinfer.config import EngineConfig, from_arguments
from jaxinfer.config import add_arguments as add_settings
from jaxinfer.console import StageBar, remark
from jaxinfer.engine.scheduler import Key, Scheduler
from jaxinfer.request import FinishReason, Output, Request, SamplingParams, StopRules, TokenLogprob

if TYPE_CHECKING:
    from jaxinfer.engine.engine import Engine

TINY = {
    "model": "tiny", "load_format": "random", "dtype": "float32", "page_size": 4, "kv_tokens": 2048, "max_sequences": 8,
    "max_step_tokens": 64,
}  # fmt: skip
CHECK_EVERY = 16


@dataclass(frozen=True)
class Verdict:
    """How a row ended: what was counted, and whether the promise held."""

    counts: dict[str, Any]
    passed: bool


@dataclass
class Answer:
    """What one request got so far: tokens, their scores where asked for, and how it ended."""

    tokens: list[int] = field(default_factory=list)
    scores: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None

    def add(self, output: Output) -> None:
        """Take a delta."""
        self.tokens += output.token_ids
        self.scores += output.logprobs
        self.reason = output.finish_reason


Answers = dict[Key, Answer]
Follow = Callable[[Request, Answer], Iterable[Request]]


@dataclass(frozen=True)
class Schedule:
    """How requests are run.

    chunk: prompt tokens of a step (0: all that the engine takes). pages: KV pages of each pool (0: all). alone: one request at a time.
    cache, digest: the prefix cache and what names its contents. rounds: how often all is run behind the same scheduler (the last counts).
    overlap, unsettled: None leaves it as the engine has it. leavers: neighbours that are aborted on the way.
    """

    chunk: int = 0
    pages: int = 0
    alone: bool = False
    cache: bool = True
    digest: Digest = sha256
    rounds: int = 1
    overlap: bool | None = None
    unsettled: bool | None = None
    leavers: int = 0
    policy: str = "fcfs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the engine's flags."""
    add_settings(parser, EngineConfig)


def settings(values: Mapping[str, Any]) -> EngineConfig:
    """The engine's settings: what was given, on the tiny model unless another one was named."""
    return from_arguments(EngineConfig, dict(values) if "model" in values else TINY | dict(values))


def flags(config: EngineConfig) -> list[str]:
    """The command line that gives these settings."""
    found = []
    for section in (config.model, config.cache, config.scheduler, config.execution, config.speculation):
        for name, value in asdict(section).items():
            if value is not None:
                text = ",".join(f"{axis}={size}" for axis, size in value._asdict().items()) if hasattr(value, "_asdict") else str(value)
                found += ["--" + name.replace("_", "-"), text]
    return found


def build(values: Mapping[str, Any]) -> Stand:
    """An engine as the flags ask for, on the stand."""
    from jaxinfer.engine.engine import Engine

    with StageBar() as bar:
        return Stand(Engine(settings(values), progress=bar))


class Stand:
    """An engine whose scheduler is exchanged from run to run; leave it idle.

    Attributes: engine, page_size, pages (in each pool), longest (tokens of a request and its answer), vocab.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.page_size = engine.program.config.pool.page_size
        self.pages = engine.program.config.pool.pages
        self.longest = engine.info.max_model_len
        self.vocab = engine.program.config.vocab
        self._limits = engine.scheduler.limits
        self._depth = engine._depth

    def restore(self) -> None:
        """A fresh scheduler as the engine had it."""
        self.arrange(Schedule())

    def arrange(self, schedule: Schedule) -> Scheduler:
        """Put a scheduler that knows nothing behind the engine; it is returned too."""
        limits = replace(
            self._limits,
            prefill_tokens=min(schedule.chunk or self._limits.prefill_tokens, self._limits.prefill_tokens),
            unsettled=self._limits.unsettled if schedule.unsettled is None else schedule.unsettled,
        )
        pages, size = min(schedule.pages or self.pages, self.pages), self.page_size
        indices = [PrefixIndex(size, digest=schedule.digest) if schedule.cache else None for _ in range(limits.replicas)]
        self.engine.scheduler = Scheduler(limits, [PagePool(pages, size, index) for index in indices], schedule.policy)
        self.engine._depth = self._depth if schedule.overlap is None else int(schedule.overlap)
        return self.engine.scheduler

    def run(self, requests: Iterable[Request], schedule: Schedule, draw: random.Random | None = None) -> Answers:
        """Run requests under a schedule; the scheduler stays for whoever wants to read its counters."""
        requests, draw = list(requests), draw or random.Random(0)
        found: Answers = {}
        if schedule.alone:
            for request in requests:
                self.arrange(schedule)
                found |= self.feed([request])
            return found
        self.arrange(schedule)
        for number in range(schedule.rounds):
            remark(f"{len(requests)} sequences, round {number + 1} of {schedule.rounds}, {schedule}")
            doomed = [self._doomed(draw, index) for index in range(schedule.leavers)]
            found = self.feed(shuffled_in(requests, doomed, draw), during=lambda step, doomed=doomed: self._leave(step, doomed))
            found = {request.key: found[request.key] for request in requests}
        return found

    def feed(
        self, requests: Iterable[Request], *, during: Callable[[int], None] | None = None, follow: Follow | None = None, window: int = 0
    ) -> Answers:  # fmt: skip
        """Run requests behind the scheduler that is there; `follow` may name more whenever one ends. Checks the scheduler on the way.

        window: at most so many wait (0: as many as the engine takes).

        Raises:
            RuntimeError: an invariant of the scheduler is broken, or something stays owned.
        """
        engine, line = self.engine, deque(requests)
        most = min(window or 1 << 30, engine.config.scheduler.max_waiting)
        open_requests: dict[Key, Request] = {}
        answers: Answers = {}
        steps = 0
        while line or engine.has_work:
            while line and engine.scheduler.waiting < most:
                engine.add(line[0])
                open_requests[line[0].key], answers[line[0].key] = line[0], Answer()
                line.popleft()
            for output in engine.step():
                key = output.request_id, output.index
                answers[key].add(output)
                if output.finish_reason is not None:
                    ended = open_requests.pop(key)
                    line.extend(follow(ended, answers[key]) if follow is not None else ())
            steps += 1
            if steps % CHECK_EVERY == 0:
                engine.scheduler.check()
            if during is not None:
                during(steps)
        engine.scheduler.check()
        if engine.scheduler.usage or open_requests:
            raise RuntimeError("all have ended, but something is owned or missing")
        return answers

    def _doomed(self, draw: random.Random, index: int) -> Request:
        prompt = tuple(draw.randrange(self.vocab) for _ in range(draw.randint(1, min(40, self.longest // 4))))
        params = SamplingParams(seed=index, max_tokens=self.longest // 2, stop=StopRules(ignore_eos=True))
        return Request(f"doomed {index}", prompt, params)

    def _leave(self, step: int, doomed: list[Request]) -> None:
        if doomed and step % 3 == 0:
            self.engine.abort(doomed[step // 3 % len(doomed)].id)


def shuffled_in(requests: list[Request], others: list[Request], draw: random.Random) -> list[Request]:
    """The requests in their order, the others at random places among them."""
    mixed = list(requests)
    for other in others:
        mixed.insert(draw.randint(0, len(mixed)), other)
    return mixed
