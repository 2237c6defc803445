"""What an EAGLE-3 head is worth at a given rate of acceptance: an 8B shape with random weights, whose drafts stand by the toss of a coin.

Everything is computed as it would be with a trained head: its forward passes, its drafts over 32k tokens, verification. Only whether a
draft stands is decided by a seeded coin instead of by the text (`step/verify.py`), which no setting of engine or server can do. A row says
how long a token takes (`itl_ms`: from the first token of a batch to its last), and the ratio to the engine without drafts in the same run,
turn by turn.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

from jaxinfer.bench import engines
from jaxinfer.bench.rows import Report
from jaxinfer.config import ConfigError, EngineConfig, from_arguments
from jaxinfer.console import remark

RATES = (0.6, 0.7, 0.8)
GOALS = {0.6: 1.6, 0.7: 1.9, 0.8: 2.2}  # times as fast at one sequence and 4 drafts
PROMPT = 512
ROOM = 128  # tokens of a sequence's pages beyond its own: a last page that is not full


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of these rows."""
    listed = " ".join(map(str, RATES))
    parser.add_argument(
        "--forced", action="append", type=float, metavar="P", help=f"with --shape: drafts stand so often; may be repeated [{listed}]"
    )
    parser.add_argument("--prompt", type=int, default=PROMPT, help=f"with --shape: random tokens of each prompt [{PROMPT}]")


def run(args: argparse.Namespace) -> int:
    """Measure every rate at every batch.

    Raises:
        ConfigError: a rate that is no probability.
    """
    rates, batches = args.forced or RATES, args.batch or (1,)
    if not all(0 <= rate <= 1 for rate in rates):
        raise ConfigError(f"--forced {rates}: shares from 0 to 1")
    longest = args.prompt + args.tokens + 8
    room = {"max_sequences": max(batches), "kv_tokens": max(batches) * (longest + ROOM)}  # both engines share the device
    values = {**room, **engines.settings_of(args, longest)}
    head = {"draft_model": values.pop("draft_model", None)}
    configs = [from_arguments(EngineConfig, values | own) for own in ({"speculate": "off"}, {"speculate": "eagle", **head})]
    with engines.opened(configs) as (plain, drafting), Report("speculation", args) as report:
        drafting.speculator.always = True
        for batch in batches:
            for rate in rates:
                remark(f"{batch} at once, drafts stand with probability {rate:g}")
                force(drafting, rate)
                for row in measure(plain, drafting, Load(batch, args.prompt, args.tokens), args.repeat):
                    goal = {"goal": GOALS[rate]} if row["way"] != "off" and batch == 1 and rate in GOALS else {}
                    report.add(kind="random", batch=batch, forced=rate, **row, **goal)
    return 0


def force(engine: Any, rate: float | None) -> None:
    """From now on drafts of this engine's greedy requests stand with this probability; None: where they are what was drawn, as ever."""
    program = engine.program
    program.config = replace(program.config, forced=rate)
    program.compile(lambda *_: None, [key for key in program.config.samplers if key.width > 1 and key.demand == 0])


class Load(NamedTuple):
    """So many sequences of so many random tokens, and how many each gets."""

    batch: int
    prompt: int
    tokens: int

    def requests(self, engine: Any) -> list[Any]:
        """The same ones each time but for their salt."""
        draw, vocab = random.Random(self.batch), engines.vocabulary(engine)
        prompts = [[draw.randrange(vocab) for _ in range(self.prompt)] for _ in range(self.batch)]
        return engines.requests(prompts, [self.tokens] * self.batch)


def measure(plain: Any, drafting: Any, load: Load, repeat: int) -> list[dict[str, Any]]:
    """A row without drafts and one with; the first turn warms up."""
    named = {"off": plain, "eagle": drafting}
    seconds: dict[str, list[float]] = {name: [] for name in named}
    before: tuple[int, ...] = ()
    for turn in range(repeat + 1):
        if turn == 1:
            before = _counts(drafting)
        for name, engine in named.items():
            taken = per_token(engine, load.requests(engine))
            seconds[name] += [taken] if turn else []
    drafts, accepted, rows = (now - then for now, then in zip(_counts(drafting), before, strict=True))
    ratios = [one / other for one, other in zip(seconds["off"], seconds["eagle"], strict=True)]
    head = drafting.program.config.draft
    vocabulary = getattr(head.config, "draft_vocab_size", head.config.vocab_size)
    about = {"prompt": load.prompt, "draft_vocabulary": vocabulary, "head_bytes": head.nbytes}
    return [
        {"way": "off", **engines.about(plain), "itl_ms": 1e3 * median(seconds["off"]), "speedup": 1.0},
        {
            "way": "eagle", **engines.about(drafting), **about, "itl_ms": 1e3 * median(seconds["eagle"]), "speedup": median(ratios),
            "acceptance": accepted / max(1, drafts), "tokens_per_step": 1 + accepted / max(1, rows),
            "turns": [round(ratio, 3) for ratio in ratios],
        },
    ]  # fmt: skip


def per_token(engine: Any, requests: Sequence[Any]) -> float:
    """Seconds from the last first token of a batch to its last token, by tokens of one sequence made in between."""
    made = dict.fromkeys((request.id for request in requests), 0)
    for request in requests:
        engine.add(request)
    begun, then = 0.0, 0
    while engine.has_work:
        for output in engine.step():
            made[output.request_id] += len(output.token_ids)
        if not begun and min(made.values()):
            begun, then = time.perf_counter(), sum(made.values())
    return (time.perf_counter() - begun) * len(requests) / max(1, sum(made.values()) - then)


def _counts(engine: Any) -> tuple[int, ...]:
    return engine.metrics.draft_tokens, engine.metrics.accepted_tokens, engine.metrics.drafts
