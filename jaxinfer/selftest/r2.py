"""R2, the scheduler and its page accounting are right: arbitrary traffic through the machine, and planted bugs that it must notice."""

from __future__ import annotations

import argparse
import random
from collections import Counter

from jaxinfer.console import remark
from jaxinfer.selftest.machine import play
from jaxinfer.selftest.mutations import MUTATIONS, planted
from jaxinfer.selftest.stand import Verdict

PROMISE = "scheduler and page accounting are right after every step, nobody starves, nothing stays owned; planted bugs are all caught"
ENGINE = False
STEPS = {"long": 5_000_000, "quick": 200_000}
EPISODE = 2_000  # steps between two fresh machines
TRIALS = 400  # episodes after which a planted bug counts as missed
SHORT = 300  # steps of these


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this row."""
    parser.add_argument("--steps", type=int, help="steps of the machine [5,000,000; 200,000 with --quick]")


def run(args: argparse.Namespace) -> Verdict:
    """Play, then plant every bug."""
    total, done = args.steps or STEPS["quick" if args.quick else "long"], 0
    draw, counts, faults = random.Random(args.seed), Counter[str](), []
    while done < total:
        seed, steps = draw.randrange(1 << 32), min(EPISODE, total - done)
        try:
            counts += play(seed, steps)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            faults.append(f"play({seed}, {steps}): {type(error).__name__}: {error}")
        done += steps
        if done % (EPISODE * 50) == 0:
            remark(f"{done:,} of {total:,} steps, {len(faults)} faults")
    caught = {name: trials for name in MUTATIONS if (trials := caught_after(name, args.seed))}
    missed = sorted(set(MUTATIONS) - set(caught))
    bugs = {"planted": len(MUTATIONS), "caught": len(caught), "missed": missed, "most_episodes": max(caught.values(), default=0)}
    figures = {"steps": done, "faults": len(faults), "first_faults": faults[:5], **bugs, "happened": dict(sorted(counts.items()))}
    return Verdict(figures, not faults and not missed)


def caught_after(name: str, seed: int) -> int:
    """How many episodes it takes to notice a planted bug; 0 when all pass with it."""
    with planted(name):
        for trial in range(TRIALS):
            try:
                play(seed + trial, SHORT)
            except Exception:  # a bug may show as any error
                return trial + 1
    return 0
