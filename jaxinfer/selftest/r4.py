"""R4, the same tokens whatever else happens: every request alone, then the same requests under each schedule.

With `--deterministic` tokens and the bits of all log probabilities must be equal; otherwise differences must be near ties (`answers.py`
says what that means) and their share is reported. A schedule that is there to force something (preemption, a prefix hit, siblings that
share) has not passed unless it did.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from jaxinfer.request import Request, SamplingParams, StopRules, choices
from jaxinfer.selftest import stand
from jaxinfer.selftest.answers import Judge, gumbel
from jaxinfer.selftest.stand import Schedule, Stand, Verdict

PROMISE = "the same tokens whatever else happens, greedy and seeded; with --deterministic the same bits"
ENGINE = True
PROMPTS = {"long": 200, "quick": 24}
LOGPROBS = 20
LONGEST_PROMPT = 96
LEAVERS = 8


@dataclass(frozen=True)
class Forced:
    """A schedule, and the counter of the scheduler that must have moved ("": none)."""

    schedule: Schedule
    counter: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this row."""
    parser.add_argument("--prompts", type=int, help="different prompts [200; 24 with --quick]")
    stand.add_arguments(parser)


def run(args: argparse.Namespace) -> Verdict:
    """Run all schedules and compare."""
    return check(stand.build(vars(args)), args.prompts or PROMPTS["quick" if args.quick else "long"], args.seed)


def check(tested: Stand, prompts: int, seed: int, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Verdict:
    """Compare every schedule with requests that ran alone. `around` is entered for each schedule (R24 spoils host memory there)."""
    draw = random.Random(seed)
    requests = variety(draw, prompts, tested)
    judge = judge_of(tested)
    expected = tested.run(requests, Schedule(alone=True, cache=False))
    figures, passed = {}, True
    for name, forced in schedules(requests, tested).items():
        with around():
            found = tested.run(requests, forced.schedule, draw)
        moved = {counter: getattr(tested.engine.scheduler, counter) for counter in ("preemptions", "reused")}
        tally = judge.compare(requests, expected, found)
        figures[name] = tally.figures() | moved
        passed = passed and not tally.faults and moved.get(forced.counter, 1) > 0
    tested.restore()
    compared, differing = (sum(row[field] for row in figures.values()) for field in ("tokens", "differing_tokens"))
    counts = {
        "model": tested.engine.info.model, "dtype": judge.dtype, "promised": "bits" if judge.exact else "near ties",
        "prompts": prompts, "sequences": len(requests), "tokens_compared": compared, "differing_tokens": differing,
        "differing_share": round(differing / max(1, compared), 6), "faults": sum(row["faults"] for row in figures.values()),
        "schedules": figures,
    }  # fmt: skip
    return Verdict(counts, passed)


def judge_of(tested: Stand) -> Judge:
    """The judge for an engine's mode and dtype."""
    engine = tested.engine
    exact, roundings = engine.config.execution.deterministic == "on", math.sqrt(2 * engine.program.config.graph.config.layers)
    return Judge(exact, engine.info.dtype, gumbel(tested.vocab), roundings)


def schedules(requests: list[Request], tested: Stand) -> dict[str, Forced]:
    """Everything that may happen to a request, by name."""
    small = scarce(requests, tested)
    return {
        "again": Forced(Schedule(alone=True, cache=False)),
        "full batch": Forced(Schedule()),
        "chunks of 1": Forced(Schedule(chunk=1)),
        "chunks of 7": Forced(Schedule(chunk=7, policy="shortest")),
        "chunks of 64": Forced(Schedule(chunk=64, policy="longest_prefix")),
        "preempted": Forced(Schedule(pages=small), "preemptions"),
        "preempted in chunks": Forced(Schedule(pages=small, chunk=11, cache=False), "preemptions"),
        "prefix hit": Forced(Schedule(rounds=2), "reused"),
        "neighbours leave": Forced(Schedule(leavers=LEAVERS)),
        "overlap on": Forced(Schedule(overlap=True, cache=False)),
        "overlap off": Forced(Schedule(overlap=False)),
        "siblings": Forced(Schedule(cache=False), "reused"),
    }


def scarce(requests: list[Request], tested: Stand) -> int:
    """So few pages that whoever runs must give way: room for the longest alone and a little more."""
    longest = max(len(request.prompt) + (request.params.max_tokens or 0) for request in requests)
    return longest // tested.page_size + 4


def variety(draw: random.Random, prompts: int, tested: Stand) -> list[Request]:
    """Requests of every kind; some share their beginning, some are siblings. Each asks for log probabilities."""
    found: list[Request] = []
    texts: list[tuple[int, ...]] = []
    longest = min(LONGEST_PROMPT, tested.longest // 2)
    for number in range(prompts):
        shared = draw.choice(texts)[: draw.randint(1, longest)] if texts and draw.random() < 0.3 else ()
        length = draw.randint(len(shared) + 1, max(len(shared) + 1, draw.choice((4, longest // 2, longest))))
        text = (*shared, *(draw.randrange(tested.vocab) for _ in range(length - len(shared))))
        texts.append(text)
        most = min(tested.longest - length, max(40, 4 * tested.page_size))
        params = replace(_params(draw, number, tested.vocab), max_tokens=draw.randint(most // 4, most), n=3 if number % 6 == 5 else 1)
        found += choices(Request(f"request {number}", text, params))
    return found


def _params(draw: random.Random, number: int, vocab: int) -> SamplingParams:
    seed = draw.getrandbits(63) - (1 << 62)
    common: dict[str, Any] = {"seed": seed, "logprobs": LOGPROBS, "stop": StopRules(ignore_eos=number % 4 > 0)}
    kinds: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": draw.choice((0.5, 1.0, 1.3))},
        {"temperature": 0.9, "top_p": 0.9, "top_k": draw.choice((0, 20)), "min_p": 0.01},
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"temperature": 1.0, "logit_bias": {draw.randrange(vocab): 3.0}, "presence_penalty": 0.5},
    )
    return SamplingParams(**common, **kinds[number % len(kinds)])
