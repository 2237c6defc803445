"""R6, the prefix cache is invisible: one trace of requests without it, with it, and with digests that collide all the time.

The trace is made while it runs without a cache: conversations grow by what was answered, begin like others, are cut and changed in the
middle, and have salts. The pool is small, so that cached pages are evicted. Then the same requests run with the cache. Salts are checked
one by one as well: what another salt computed must not be reused, what the same salt computed must be.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.cache.prefix import sha256
from jaxinfer.request import Request, SamplingParams, StopRules
from jaxinfer.selftest import stand
from jaxinfer.selftest.r4 import judge_of
from jaxinfer.selftest.stand import Answer, Answers, Schedule, Stand, Verdict

PROMISE = "the prefix cache is invisible: equal tokens with and without it, salts never share, digests may collide"
ENGINE = True
REQUESTS = {"long": 20_000, "quick": 300}
PAGES = 64
LONGEST = 24  # pages of a conversation
SALTS = ("", "a", "A", "a ", "aa", "('a',)", "\0", "b'a'", "ä")
BITS = 6
OPEN = 12  # conversations that go on at once
LOGPROBS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this row."""
    parser.add_argument("--requests", type=int, help="requests of the trace [20,000; 300 with --quick]")
    stand.add_arguments(parser)


def run(args: argparse.Namespace) -> Verdict:
    """Make the trace, replay it, try the salts."""
    return check(stand.build(vars(args)), args.requests or REQUESTS["quick" if args.quick else "long"], args.seed)


def check(tested: Stand, requests: int, seed: int) -> Verdict:
    """Compare replays with the cache to a run without."""
    draw = random.Random(seed)
    trace = Trace(draw, tested, requests)
    tested.arrange(Schedule(cache=False, pages=PAGES))
    expected = tested.feed(trace.begin(), follow=trace.follow, window=OPEN)
    judge, figures, passed = judge_of(tested), {}, True
    for name, digest in {"cache on": sha256, "collisions": few_bits}.items():
        found, moved = _replay(tested, trace.requests, Schedule(pages=PAGES, digest=digest))
        tally = judge.compare(trace.requests, expected, found)
        figures[name] = tally.figures() | moved
        passed = passed and not tally.faults and moved["reused"] > 0
    salted = salts(tested, draw, max(20, requests // 50))
    tested.restore()
    counts = {"requests": len(trace.requests), "model": tested.engine.info.model, "dtype": judge.dtype, **figures, "salts": salted}
    return Verdict(counts, passed and figures["cache on"]["evictions"] > 0 and not salted["wrong"])


def salts(tested: Stand, draw: random.Random, rounds: int) -> dict[str, Any]:
    """Ask for one prompt under one salt, another, and the first again: only the last may find anything computed."""
    wrong, size = [], tested.page_size
    for number in range(rounds):
        mine, other = draw.sample(SALTS, 2)
        prompt = _tokens(draw, tested, draw.randint(2 * size + 1, 6 * size))
        scheduler = tested.arrange(Schedule())
        found = []
        for salt in (mine, other, mine):
            before = scheduler.reused
            tested.feed([Request(f"salt {number}", prompt, SamplingParams(temperature=0, max_tokens=1), cache_salt=salt)])
            found.append(scheduler.reused - before)
        if found != [0, 0, (len(prompt) - 1) // size * size]:
            wrong.append(f"salts {mine!r}, {other!r}, {mine!r} on {len(prompt)} tokens reused {found}")
    return {"rounds": rounds, "wrong": len(wrong), "first_wrong": wrong[:5]}


def few_bits(data: bytes) -> bytes:
    """A digest that many contents share."""
    return bytes((sha256(data)[0] % (1 << BITS),))


@dataclass
class Trace:
    """Requests that grow out of what was answered; `requests` are those made so far, at most `most`."""

    draw: random.Random
    tested: Stand
    most: int
    requests: list[Request] = field(default_factory=list)

    def begin(self) -> list[Request]:
        """The first request of each conversation that is open."""
        return [self._next((), self.draw.choice(SALTS[:4])) for _ in range(min(OPEN, self.most))]

    def follow(self, request: Request, answer: Answer) -> list[Request]:
        """What comes after an answer: the conversation goes on, is cut and changed, or another one begins."""
        if len(self.requests) >= self.most:
            return []
        text, salt, chance = (*request.prompt, *answer.tokens), request.cache_salt, self.draw.random()
        if chance < 0.25:
            old = self.draw.choice(self.requests[-100:])
            text, salt = old.prompt[: self.draw.randint(1, len(old.prompt))], self.draw.choice((salt, old.cache_salt))
        elif chance < 0.35:
            at = self.draw.randrange(len(text))
            text = (*text[:at], self.draw.randrange(self.tested.vocab), *text[at + 1 :])
        elif chance < 0.4:
            text = ()
        return [self._next(text, salt)]

    def _next(self, text: tuple[int, ...], salt: str) -> Request:
        draw, longest = self.draw, min(LONGEST * self.tested.page_size, self.tested.longest)
        most = draw.choice((1, 3, 6, 10))
        prompt = (*text, *_tokens(draw, self.tested, draw.randint(1, 3 * self.tested.page_size)))
        if len(prompt) + most > longest:
            prompt = prompt[: longest // 4]
        temperature, stop = draw.choice((0.0, 0.8)), StopRules(ignore_eos=True)
        params = SamplingParams(temperature=temperature, seed=draw.getrandbits(60), max_tokens=most, logprobs=LOGPROBS, stop=stop)
        self.requests.append(Request(f"{len(self.requests)}", prompt, params, cache_salt=salt))
        return self.requests[-1]


def _replay(tested: Stand, requests: list[Request], schedule: Schedule) -> tuple[Answers, dict[str, int]]:
    """Run the trace behind a cache; what it reused and evicted too."""
    scheduler, evicted = tested.arrange(schedule), []
    for pool in scheduler.pools:
        pool._evict = _noted(pool._evict, evicted)
    answers = tested.feed(requests, window=OPEN)
    return answers, {"reused": scheduler.reused, "evictions": len(evicted), "preemptions": scheduler.preemptions}


def _noted(evict: Any, evicted: list[int]) -> Any:
    def noted() -> int:
        evicted.append(evict())
        return evicted[-1]

    return noted


def _tokens(draw: random.Random, tested: Stand, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(tested.vocab) for _ in range(count))
