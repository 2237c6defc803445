"""Tokens per second with drafts beside none: an engine for each way to draft, on stories, chats and copying, turn by turn in one run.

A row says how many tokens per second a batch gets, the ratio to the engine without drafts (`speedup`: median of turns that lie side by
side), the share of drafts that stood (`acceptance`), tokens per sequence and step, and whether all tokens are those of the engine without
drafts (`equal`; in narrow numbers a near tie may fall differently). `costs_little`: drafts cost at most 3 % (`MOST_LOSS`), whatever the
batch. The whole sweep: `jaxinfer bench speculation --batch 1,2,4,8,16,32,64,128,256 --json`.

`--shape NAME` takes random weights of a well-known model and an EAGLE-3 head of its shape instead, and forces how often drafts stand: what
a trained head would be worth at each rate of acceptance (`forced.py`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from jaxinfer.bench import engines, forced
from jaxinfer.bench.rows import Report, add_output_arguments
from jaxinfer.config import ConfigError, EngineConfig, from_arguments
from jaxinfer.config import add_arguments as add_settings
from jaxinfer.console import remark
from jaxinfer.request import Request

HELP = "tokens per second with each way to draft, beside none"
BATCHES = (1, 8, 64)
WAYS = ("lookup", "draft", "auto")
ALL_WAYS = ("lookup", "draft", "eagle", "auto")  # "eagle" needs a head
KINDS = ("story", "chat", "copying")
MOST_LOSS = 0.03
LONGEST = 512  # tokens of a sequence, unless --max-model-len says so
NAMES = ("Lily", "Tom", "Mia", "Ben", "Anna", "Max", "Sara", "Sam")
THINGS = ("a red ball", "a little dog", "a big tree", "a blue kite", "an old boat", "a small garden", "a shiny stone", "a warm hat")
PLACES = ("the park", "the forest", "the beach", "the farm", "the garden", "the school", "the river", "the house")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    for name, values, kind in (("batch", BATCHES, int), ("way", WAYS, str), ("kind", KINDS, str)):
        listed = " ".join(map(str, values))
        choices = None if kind is int else ALL_WAYS if name == "way" else values
        parser.add_argument(f"--{name}", action="extend", type=several(kind, choices), help=f"only these, with commas between [{listed}]")
    engines.add_shape_argument(parser)
    forced.add_arguments(parser)
    parser.add_argument("--tokens", type=int, default=96, help="tokens that each request gets [96]")
    parser.add_argument("--always", action="store_true", help="draft whatever it costs, to see how many drafts stand")
    add_output_arguments(parser)
    add_settings(parser, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Measure every way on every kind of prompt; 1 if float32 tokens differ. With a shape: forced acceptance."""
    if args.shape is not None:
        return forced.run(args)
    ways: Sequence[str] = args.way or WAYS
    batches, kinds = args.batch or BATCHES, args.kind or KINDS
    values: dict[str, Any] = {"max_sequences": max(batches), "max_model_len": LONGEST, **vars(args)}
    values = {"kv_tokens": max(batches) * values["max_model_len"], **values}  # several engines share the device
    small = {"draft_model": values.pop("draft_model", None)}
    settings = [{**values, "speculate": way, **(small if way in ("draft", "eagle", "auto") else {})} for way in ("off", *ways)]
    configs = [from_arguments(EngineConfig, own) for own in settings]
    equal = True
    with engines.opened(configs) as opened, Report("speculation", args) as report:
        named: dict[str, Any] = dict(zip(("off", *ways), opened, strict=True))
        for engine in opened[1:]:
            engine.speculator.always = args.always
        for kind in kinds:
            for batch in batches:
                remark(f"{kind}, {batch} at once")
                for row in measure(named, prompts(kind, batch, opened[0].tokenizer), args.tokens, args.repeat):
                    equal = equal and (row["equal"] or row["dtype"] != "float32")
                    report.add(kind=kind, batch=batch, **row)
    return int(not equal)


def measure(named: dict[str, Any], texts: Sequence[Sequence[int]], tokens: int, repeat: int) -> list[dict[str, Any]]:
    """One row for each engine; the first is the one without drafts. The first turn warms up and fills the history of drafts."""
    seconds: dict[str, list[float]] = {name: [] for name in named}
    made: dict[str, dict[str, tuple[int, ...]]] = {}
    before = {}
    for turn in range(repeat + 1):
        for name, engine in named.items():
            counts = engine.metrics
            before[name] = before.get(name) or (counts.drafts, counts.draft_tokens, counts.accepted_tokens, counts.steps_total)
            begun = time.perf_counter()
            made[name] = answers(engine, engines.requests(texts, [tokens] * len(texts)))
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    base = next(iter(named))
    rows = []
    for name, engine in named.items():
        counts, (drafts, proposed, accepted, steps) = engine.metrics, before[name]
        ratios = [one / other for one, other in zip(seconds[base], seconds[name], strict=True)]
        total, speedup = len(texts) * tokens, median(ratios)
        rows.append({
            "way": name, **engines.about(engine), "tokens_per_second": total / median(seconds[name]), "speedup": speedup,
            "costs_little": speedup >= 1 - MOST_LOSS, "drafts": counts.draft_tokens - proposed,
            "acceptance": (counts.accepted_tokens - accepted) / max(1, counts.draft_tokens - proposed),
            "drafted_rows": counts.drafts - drafts, "tokens_per_step": (repeat + 1) * tokens / (counts.steps_total - steps),
            "equal": made[name] == made[base], "turns": [round(ratio, 3) for ratio in ratios],
        })  # fmt: skip
    return rows


def several(kind: Callable[[str], Any], choices: Sequence[Any] | None) -> Callable[[str], list[Any]]:
    """A parser of values with commas between them."""

    def parser(text: str) -> list[Any]:
        found = [kind(part) for part in text.split(",") if part]
        unknown = [part for part in found if choices is not None and part not in choices]
        if unknown or not found or min([part for part in found if isinstance(part, int)], default=1) < 1:
            wanted = "counts from 1" if choices is None else ", ".join(choices)
            raise argparse.ArgumentTypeError(f"{text!r}: write {wanted}, with commas between")
        return found

    return parser


def answers(engine: Any, requests: Sequence[Request]) -> dict[str, tuple[int, ...]]:
    """Run requests together; the tokens of each."""
    found = {request.id: () for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] += output.token_ids
    return found


def prompts(kind: str, count: int, tokenizer: Any) -> list[list[int]]:
    """So many different prompts of a kind.

    Raises:
        ConfigError: a model without a tokenizer.
    """
    if tokenizer is None:
        raise ConfigError("bench speculation writes its prompts as text, so it needs a model with a tokenizer")
    found = []
    for number in range(count):
        name, thing, place = NAMES[number % 8], THINGS[number // 8 % 8], PLACES[(number + number // 8 + number // 64) % 8]
        story = (
            f"One day, {name} went to {place}. {name} saw {thing} there. It was very nice. {name} wanted to take {thing} home, but it was"
            f" too far away. So {name} asked a friend for help. The friend came to {place} and they looked at {thing} together."
        )
        asked = f"Copy this text exactly: {story}" if kind == "copying" else f"Tell me a short story about {name} and {thing} in {place}."
        if kind == "story":
            found.append(tokenizer.encode("".join(story.partition("there.")[:2] if number > 63 else story.partition(".")[:2])))
        else:
            found.append(tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": asked}]), special=False))
    return found
