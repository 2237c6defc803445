"""R5, drafts change nothing but speed: the same tokens as without under R4's schedules, and the same distribution where all rules apply.

First every request runs alone on an engine without drafts, then under each schedule of R4 on one that drafts whatever it costs, from the
text and from a draft model; and once more under some with drafts of the model alone, where steps are launched before it is known what came
of the one before. Tokens must be equal (`answers.py` says what rounding may explain; greedy tokens of float32 must be equal to the last
one). Then the verifier alone: in each context, a request with all filters, penalties and rules and a draft, tokens are drawn often at the
draft's place and behind it, and compared with as many draws of the plain sampler by a chi-square test of homogeneity, all p-values by
Holm's method (1979). Drafts that are no token ids must be refused.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace

from jaxinfer.selftest import r4, stand
from jaxinfer.selftest.stand import Schedule, Stand, Verdict

PROMISE = "drafts change nothing but speed: the same tokens, the same distribution"
ENGINE = True
SIZES = {"long": (50, 100_000), "quick": (4, 4_000)}  # contexts, draws in each
SIGNIFICANCE = 1e-3
UNSEEN = ("full batch", "preempted", "neighbours leave", "siblings")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this row."""
    r4.add_arguments(parser)


def run(args: argparse.Namespace) -> Verdict:
    """Both parts."""
    kind, values = "quick" if args.quick else "long", vars(args)
    named = values.get("model", "tiny")
    drafts = {"speculate": "auto", "draft_model": values.get("draft_model", "draft" if named == "demo" else named)}
    plain, drafting = stand.build(values | {"speculate": "off"}), stand.build(values | drafts)
    tokens = check(plain, drafting, args.prompts or r4.PROMPTS[kind], args.seed)
    draws = check_draws(*SIZES[kind], args.seed)
    return Verdict({**tokens.counts, **draws.counts}, tokens.passed and draws.passed)


def check(plain: Stand, drafting: Stand, prompts: int, seed: int) -> Verdict:
    """Compare every schedule with drafts to requests that ran alone without."""
    draw, speculator = random.Random(seed), drafting.engine.speculator
    if speculator is None:
        raise ValueError("the second engine must be one that drafts")
    speculator.always = True
    requests = r4.variety(draw, prompts, plain)
    judge = r4.judge_of(plain)
    expected = plain.run(requests, Schedule(alone=True, cache=False))
    figures, passed, metrics, everybody = {}, True, drafting.engine.metrics, speculator.proposers
    for name, schedule in _schedules(r4.schedules(requests, drafting)):
        before = metrics.draft_tokens, metrics.accepted_tokens
        speculator.proposers = [proposer for proposer in everybody if proposer.DEVICE or not schedule.unsettled]
        found = drafting.run(requests, schedule, draw)
        made, stood = metrics.draft_tokens - before[0], metrics.accepted_tokens - before[1]
        tally = judge.compare(requests, expected, found)
        figures[name] = tally.figures() | {"drafts": made, "accepted": stood}
        exact = judge.dtype == "float32" and any(
            expected[request.key].tokens != found[request.key].tokens for request in requests if request.params.greedy
        )
        passed = passed and not tally.faults and not exact and made > stood > 0
    speculator.proposers = everybody
    plain.restore()
    drafting.restore()
    counts = {
        "model": plain.engine.info.model, "dtype": judge.dtype, "sequences": len(requests),
        "drafts": sum(row["drafts"] for row in figures.values()), "accepted": sum(row["accepted"] for row in figures.values()),
        "differing_tokens": sum(row["differing_tokens"] for row in figures.values()), "bad_drafts_refused": refuses(plain.vocab),
        "schedules": figures,
    }  # fmt: skip
    return Verdict(counts, passed and counts["bad_drafts_refused"])


def _schedules(found: dict[str, r4.Forced]) -> Iterator[tuple[str, Schedule]]:
    """Each as it is; some again for drafts that the host never sees."""
    for name, forced in found.items():
        yield name, forced.schedule
        if name in UNSEEN:
            yield f"{name}, drafts unseen", replace(forced.schedule, unsettled=True)


def refuses(vocab: int) -> bool:
    """Whether drafts end before what is no token id."""
    from jaxinfer.engine.proposers.proposal import checked

    bad = (-1, -2, vocab, vocab + 1, 1 << 31)
    return all(checked((0, vocab - 1, token, 1), vocab) == (0, vocab - 1) for token in bad)


def check_draws(contexts: int, draws: int, seed: int) -> Verdict:
    """The distribution of verified draws against that of plain ones."""
    from jaxinfer.selftest import draws as tested

    pvalues = [value for number in range(contexts) for value in tested.compare(seed * 10_007 + number, draws)]
    return judged(pvalues, contexts, draws)


def judged(pvalues: list[float], contexts: int, draws: int) -> Verdict:
    """Holm: of m p-values the smallest is multiplied by m, the next by m - 1, and so on; none may be significant then."""
    ordered = sorted(pvalues)
    smallest = min(min(1.0, value * (len(ordered) - rank)) for rank, value in enumerate(ordered))
    counts = {"contexts": contexts, "draws_in_each": draws, "tests": len(ordered), "smallest_p_holm": round(smallest, 6)}
    return Verdict(counts, smallest > SIGNIFICANCE)
