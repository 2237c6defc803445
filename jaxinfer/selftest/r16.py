"""R16, bad numbers stay in their row: requests that meet a NaN end with an error, their neighbours get what they get without them.

The NaN stands in the embedding of one token, so a prompt that holds it is ill from there on. Ill requests come in at random places
among the others, with the NaN at random places of prompts of random length, behind schedules drawn at random. Afterwards no page but the
guard pages may hold anything that is not finite: what an ill request left was wiped before anybody could use it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from jaxinfer.config import ConfigError
from jaxinfer.request import FinishReason, Request, SamplingParams
from jaxinfer.selftest import r4, stand
from jaxinfer.selftest.stand import Answers, Schedule, Stand, Verdict, shuffled_in

PROMISE = "bad numbers stay in their row: it ends with an error, the others get the same tokens, its pages are wiped before reuse"
ENGINE = True
ROUNDS = {"long": 200, "quick": 12}
PROMPTS = 16
ILL = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this row."""
    parser.add_argument("--rounds", type=int, help="rounds of 16 prompts with 4 ill ones among them [200; 12 with --quick]")
    stand.add_arguments(parser)


def run(args: argparse.Namespace) -> Verdict:
    """Run all rounds."""
    return check(stand.build(vars(args)), args.rounds or ROUNDS["quick" if args.quick else "long"], args.seed)


def check(tested: Stand, rounds: int, seed: int, prompts: int = PROMPTS) -> Verdict:
    """In each round: healthy requests without ill ones, then with them.

    Raises:
        ConfigError: the model's embedding is its head as well, so that a NaN there is in everybody's logits.
    """
    draw, judge = random.Random(seed), r4.judge_of(tested)
    counts = {"rounds": rounds, "ill": 0, "ill_not_ended": 0, "sequences": 0, "faults": 0, "pages_left_bad": 0}
    first: list[str] = []
    for _ in range(rounds):
        poison = draw.randrange(tested.vocab)
        healthy = [_without(request, poison) for request in r4.variety(draw, prompts, tested) if poison not in request.prompt]
        expected = tested.run(healthy, Schedule(cache=False))
        ill = [_ill(draw, tested, poison, number) for number in range(ILL)]
        schedule = draw.choice((Schedule(), Schedule(chunk=7), Schedule(pages=r4.scarce(healthy, tested)), Schedule(overlap=False)))
        with poisoned(tested, poison):
            found = tested.run(shuffled_in(healthy, ill, draw), schedule, draw)
            counts["pages_left_bad"] += bad_pages(tested)
            tested.feed(ill)  # nobody comes after them, so nothing covers what they leave
            counts["pages_left_bad"] += bad_pages(tested)
        tally = judge.compare([r for r in healthy if poison not in expected[r.key].tokens], expected, found)
        counts["ill"] += len(ill)
        counts["ill_not_ended"] += sum(not _ended(found, request) for request in ill)
        counts["sequences"] += tally.sequences
        counts["faults"] += tally.faults
        first += tally.first_faults
    tested.restore()
    passed = not counts["ill_not_ended"] and not counts["faults"] and not counts["pages_left_bad"]
    return Verdict(counts | {"first_faults": first[:5]}, passed)


@contextmanager
def poisoned(tested: Stand, token: int) -> Iterator[None]:
    """While this is open, the embedding of a token is NaN."""
    program = tested.engine.program
    graph, leaves = program.config.graph, program._leaves
    if graph.config.tied_embeddings:
        raise ConfigError("this row needs a model whose embedding is not its head; take the default one")
    weights: dict[str, Any] = graph.weights(leaves)
    program._leaves = graph.leaves(weights | {"embedding.weight": weights["embedding.weight"].at[token].set(float("nan"))})
    try:
        yield
    finally:
        program._leaves = leaves


def bad_pages(tested: Stand) -> int:
    """How many pages, guard pages aside, hold a number that is not finite, in any layer."""
    import jax.numpy as jnp
    import numpy as np

    bad = np.zeros(tested.engine.program.config.pool.all_pages, bool)
    for pool in tested.engine.program._kv:
        bad |= ~np.asarray(jnp.isfinite(pool).all(axis=tuple(range(1, pool.ndim))))
    bad[:: tested.pages] = False
    return int(bad.sum())


def _ill(draw: random.Random, tested: Stand, poison: int, number: int) -> Request:
    prompt = [draw.randrange(tested.vocab) for _ in range(draw.randint(1, min(60, tested.longest // 2)))]
    prompt[draw.randrange(len(prompt))] = poison
    return Request(f"ill {number}", tuple(prompt), SamplingParams(seed=number, max_tokens=8), index=draw.randrange(3))


def _without(request: Request, token: int) -> Request:
    """The same request, but it does not draw that token."""
    return replace(request, params=replace(request.params, logit_bias={token: -100.0}))


def _ended(found: Answers, request: Request) -> bool:
    answer = found[request.key]
    return answer.reason == FinishReason.ERROR and not answer.tokens
