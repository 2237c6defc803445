"""Tokens per second with drafts beside none: an engine for each way to draft, on stories, chats and copying, turn by turn in one run.

Stories and chats go on for `--tokens`, whatever the model says: in narrow numbers a near tie may fall differently, and an answer that ends
early leaves steps with fewer rows, which cost as much. Other answers end where the model ends them, or after `--tokens`. Copying is asked
for within what the embedded model has learnt, a list of nine words, so that what is measured is copying: once where the text stands in the
question alone ("copying"), once where the same has been asked for and answered before ("again"), as when a text is edited or an answer made
anew. At least `LEAST` prompts run in a turn, in parts if few run at once. `--data FILE.jsonl` takes the user's own prompts instead (as many
of its lines as are needed, from the first).

A row says how many tokens per second a batch gets, the share of drafts that stood (`acceptance`), tokens per sequence and step, and
whether all tokens are those of the engine without drafts (`equal`; in narrow numbers a near tie may fall differently).

There are two engines without drafts, made first and last: two that are alike need not be equally fast (on an H200 the first was up to 4 %
faster, and why is not known). Of each part of the prompts one of them runs at both ends, which neighbours share, and the other in the
middle; between, each way runs once on the way there and once on the way back. So a machine that gets slower or faster favours none, and no
engine runs right after itself. Each run comes right behind a few tokens that do not count (`WARMING`): engines that take turns find nothing
in the processor's cache, and on a GPU nothing where it lay, for which one that runs alone does not pay. `speedup` is the ratio of the two
engines' time per token, their mean, to that of a way's two runs, over all turns; `interval` is the 90 % interval of that (`turns.py`). The
row "control" compares the one in the middle with the one at the ends: what it says is noise, and how far two engines that are alike differ.
`costs_little` answers whether drafts cost at most 3 % (`MOST_LOSS`), whatever the batch: "shown" if the whole interval lies at 0.97 or
above, "broken" if all of it lies below, else "not shown", as after fewer than 8 turns. `--seconds` gives each kind and batch so long, its
warm-up included, for as many turns as that makes. The whole sweep, 9 minutes of measuring:
`jaxinfer bench speculation --kind story --batch 1,2,4,8,16,32,64,128,256 --seconds 60 --json`.

`--shape NAME` takes random weights of a well-known model and an EAGLE-3 head of its shape instead, and forces how often drafts stand: what
a trained head would be worth at each rate of acceptance (`forced.py`).
"""

from __future__ import annotations

import argparse
import math
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

from jaxinfer.bench import engines, forced, turns
from jaxinfer.bench.rows import Report, add_output_arguments
from jaxinfer.config import ConfigError, EngineConfig, from_arguments
from jaxinfer.config import add_arguments as add_settings
from jaxinfer.console import remark
from jaxinfer.prompts import Lines, encode, read
from jaxinfer.request import Request, SamplingParams

HELP = "tokens per second with each way to draft, beside none"
BATCHES = (1, 8, 64)
WAYS = ("lookup", "draft", "auto")
ALL_WAYS = ("lookup", "draft", "eagle", "auto")  # "eagle" needs a head
KINDS = ("story", "chat", "copying", "again")
ENDLESS = ("story", "chat")
CONTROL = "control"
LEAST = 4  # prompts of a turn
WARMING = 8  # tokens of each sequence before a run
MOST_LOSS = 0.03
LONGEST = 512  # tokens of a sequence, unless --max-model-len says so
NAMES = ("Lily", "Tom", "Mia", "Ben", "Anna", "Max", "Sara", "Sam")
THINGS = ("a red ball", "a little dog", "a big tree", "a blue kite", "an old boat", "a small garden", "a shiny stone", "a warm hat")
PLACES = ("the park", "the forest", "the beach", "the farm", "the garden", "the school", "the river", "the house")
WORDS = (
    "apple", "basket", "bell", "blanket", "bottle", "bread", "bridge", "candle", "carrot", "cloud", "farm", "flower", "forest", "garden",
    "guitar", "hammer", "horse", "island", "kitchen", "ladder", "lamp", "market", "mirror", "mountain", "ocean", "paper", "pencil",
    "pillow", "rabbit", "river", "shirt", "ship", "stone", "street", "table", "tiger", "tower", "train", "valley", "window",
)  # fmt: skip
NO_TOKENIZER = "bench speculation writes its prompts as text, so it needs a model with a tokenizer"
COPIED = 9  # words: as many as the embedded model has learnt to copy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    for name, values, kind in (("batch", BATCHES, int), ("way", WAYS, str), ("kind", KINDS, str)):
        listed = " ".join(map(str, values))
        choices = None if kind is int else ALL_WAYS if name == "way" else values
        parser.add_argument(f"--{name}", action="extend", type=several(kind, choices), help=f"only these, with commas between [{listed}]")
    engines.add_shape_argument(parser)
    forced.add_arguments(parser)
    parser.add_argument("--data", type=Path, metavar="FILE", help="prompts as JSON lines, as for audit and distill, in place of --kind")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer, at most [96]")
    parser.add_argument("--always", action="store_true", help="draft whatever it costs, to see how many drafts stand")
    parser.add_argument("--seconds", type=_seconds, default=0.0, metavar="S", help="turns for each kind and batch, at least --repeat [0]")
    add_output_arguments(parser)
    add_settings(parser, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Measure every way on every kind of prompt; 1 if float32 tokens differ. With a shape: forced acceptance."""
    lines = _lines(args)
    if args.shape is not None:
        return forced.run(args)
    ways, batches = args.way or WAYS, args.batch or BATCHES
    kinds = args.kind or KINDS if lines is None else ("data",)
    equal = True
    with engines.opened(_configs(args, ways, max(batches))) as opened, Report("speculation", args) as report:
        named: dict[str, Any] = dict(zip(("off", *ways, CONTROL), opened, strict=True))
        for engine in opened[1:-1]:
            engine.speculator.always = args.always
        for kind, batch in product(kinds, batches):
            remark(f"{kind}, {batch} at once")
            most = batch * math.ceil(LEAST / batch)
            texts = prompts(kind, most, opened[0].tokenizer) if lines is None else own(lines, opened[0], most, args.tokens)
            for row in measure(named, Load(texts, batch, args.tokens, kind in ENDLESS), args.repeat, args.seconds):
                equal = equal and (row["equal"] or row["dtype"] != "float32")
                report.add(kind=kind, batch=batch, **row)
    return int(not equal)


def _lines(args: argparse.Namespace) -> Lines | None:
    """The user's own prompts, if any; a ConfigError for flags that do not go together."""
    if args.seconds and args.shape is not None:
        raise ConfigError("--seconds is for prompts: with --shape, --repeat alone says how many turns there are")
    if args.data is None:
        return None
    if args.kind or args.shape is not None:
        raise ConfigError("--data brings its own prompts: leave --kind and --shape out, or --data")
    return read(args.data)


def _configs(args: argparse.Namespace, ways: Sequence[str], most: int) -> list[EngineConfig]:
    """An engine for each way between two without drafts; they share the device, so each has room for what is measured."""
    values: dict[str, Any] = {"max_sequences": most, "max_model_len": LONGEST, **vars(args)}
    values = {"kv_tokens": most * values["max_model_len"], **values}
    small = {"draft_model": values.pop("draft_model", None)}
    settings = [{**values, "speculate": way, **(small if way in ("draft", "eagle", "auto") else {})} for way in ("off", *ways, "off")]
    return [from_arguments(EngineConfig, each) for each in settings]


class Load(NamedTuple):
    """Prompts, how many of them run at once, as one part of all, and the most tokens of an answer; endless: it has exactly so many."""

    texts: Sequence[Sequence[int]]
    batch: int
    tokens: int
    endless: bool = False

    @property
    def parts(self) -> tuple[Load, ...]:
        """One for each time that so many run."""
        return tuple(self._replace(texts=self.texts[at : at + self.batch]) for at in range(0, len(self.texts), self.batch))

    def requests(self) -> list[Request]:
        """Greedy ones. Each call has a salt of its own: only these share cached beginnings."""
        salt, params = secrets.token_hex(8), SamplingParams.of(temperature=0.0, max_tokens=self.tokens, ignore_eos=self.endless)
        return [Request(f"bench-{number}", tuple(text), params, cache_salt=salt) for number, text in enumerate(self.texts)]


class Made(NamedTuple):
    """The tokens of each request, and in how many steps they were drawn, summed over the requests."""

    tokens: dict[str, tuple[int, ...]]
    steps: int

    @property
    def total(self) -> int:
        """All tokens."""
        return sum(map(len, self.tokens.values()))


def measure(named: dict[str, Any], load: Load, repeat: int, seconds: float = 0.0) -> list[dict[str, Any]]:
    """One row for each engine; the first and the last, the control, are those without drafts. A turn runs all parts of the load, one after
    another, each by all engines. The first one warms up and fills the history of drafts. There are at least `repeat` more, and as many as
    begin before so many seconds have passed."""
    base, *ways, control = named
    end, parts = time.perf_counter() + seconds, load.parts
    runs = {name: Runs() for name in named}
    told: dict[int, Made] = {}  # by the first engine, last, of each part

    def run_one(name: str, part: int) -> None:
        warm(named[name], parts[part])
        before, begun = _counts(named[name]), time.perf_counter()
        made = answers(named[name], parts[part])
        seconds = time.perf_counter() - begun
        runs[name].add(made, seconds, (now - then for now, then in zip(_counts(named[name]), before, strict=True)))
        if name == base:
            told[part] = made
        runs[name].equal &= made.tokens == told[part].tokens

    size = len(parts)
    for part in range(size):
        run_one(base, part)
    for turn in count():
        if turn > repeat and time.perf_counter() >= end:
            break
        for part, name in product(range(size), (*ways, control, *reversed(ways), base)):
            run_one(name, part)
    paces, rows = {name: _means(runs[name].paces[2 * size :], 2 * size) for name in ways}, []
    shared = runs[base].paces[2 * size - 1 :]  # from the end of the first turn on; of each turn the ends count once for each part
    ends, paces[control] = _means(_between(pairwise(shared)), size), _means(runs[control].paces[size:], size)
    paces[base] = _between(zip(ends, paces[control], strict=True))
    for name, engine in named.items():
        ratio = turns.compare(ends if name == control else paces[base], paces[name])
        rows.append({
            "way": name, **engines.about(engine), "tokens_per_second": len(paces[name]) / sum(paces[name]), "speedup": ratio.value,
            "interval": ratio.interval and tuple(round(bound, 4) for bound in ratio.interval),
            "costs_little": ratio.at_least(1 - MOST_LOSS), **runs[name].about(),
            "turns": [round(each, 3) for each in ratio.turns],
        })  # fmt: skip
    return rows


def _between(pairs: Iterable[tuple[float, float]]) -> list[float]:
    """The middle of each."""
    return [(one + other) / 2 for one, other in pairs]


def _means(values: Sequence[float], count: int) -> list[float]:
    """Of so many that follow one another."""
    return [sum(values[at : at + count]) / count for at in range(0, len(values), count)]


@dataclass
class Runs:
    """All runs of an engine at its place in the turns, from the one that warms up on.

    paces: seconds per token of each; near ties that fall differently make answers differ in length. tokens, steps, counts (rows that had
    drafts, drafts, those that stood): of all. equal: whether all tokens were those of the engine without drafts.
    """

    paces: list[float] = field(default_factory=list)
    last: Made = Made({}, 0)
    tokens: int = 0
    steps: int = 0
    counts: tuple[int, ...] = (0, 0, 0)
    equal: bool = True

    def add(self, made: Made, seconds: float, counts: Iterable[int]) -> None:
        """Take one in."""
        self.last = made
        self.counts = tuple(map(sum, zip(self.counts, counts, strict=True)))
        self.paces.append(seconds / made.total)
        self.tokens += made.total
        self.steps += made.steps

    def about(self) -> dict[str, Any]:
        """How drafts fared in all of them, how many tokens were made in the last, and whether they are the right ones."""
        rowed, proposed, accepted = self.counts
        return {
            "drafts": proposed, "acceptance": accepted / max(1, proposed), "drafted_rows": rowed, "tokens": self.last.total,
            "tokens_per_step": self.tokens / self.steps, "equal": self.equal,
        }  # fmt: skip


def _counts(engine: Any) -> tuple[int, int, int]:
    counts = engine.metrics
    return counts.drafts, counts.draft_tokens, counts.accepted_tokens


def _seconds(text: str) -> float:
    """Raises ValueError for anything but a number from 0."""
    if not 0 <= (seconds := float(text)) < math.inf:
        raise ValueError(text)
    return seconds


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


def answers(engine: Any, load: Load) -> Made:
    """Run requests, so many at once."""
    waiting, running, steps = deque(load.requests()), 0, 0
    found: dict[str, tuple[int, ...]] = {request.id: () for request in waiting}
    while waiting or running:
        while waiting and running < load.batch:
            engine.add(waiting.popleft())
            running += 1
        for output in engine.step():
            found[output.request_id] += output.token_ids
            steps += bool(output.token_ids)
            running -= output.finish_reason is not None
    return Made(found, steps)


def warm(engine: Any, load: Load) -> None:
    """Run a few tokens of each request, so that the engine is as fast as one that runs alone."""
    answers(engine, load._replace(tokens=min(WARMING, load.tokens)))


def own(lines: Lines, engine: Any, count: int, tokens: int) -> list[list[int]]:
    """The user's first prompts, over again if there are fewer than `count`.

    Raises:
        ConfigError: no tokenizer, or a prompt that leaves no room for an answer.
    """
    if engine.tokenizer is None:
        raise ConfigError(NO_TOKENIZER)
    few = replace(lines, lines=lines.lines[:count])
    found = [list(document.prompt) for document in encode(few, engine.tokenizer, engine.info.max_model_len - tokens + 1)]
    return [found[number % len(found)] for number in range(count)]


def prompts(kind: str, count: int, tokenizer: Any) -> list[list[int]]:
    """So many different prompts of a kind.

    Raises:
        ConfigError: a model without a tokenizer.
    """
    if tokenizer is None:
        raise ConfigError(NO_TOKENIZER)
    return [text(kind, number, tokenizer) for number in range(count)]


def text(kind: str, number: int, tokenizer: Any) -> list[int]:
    """One prompt of a kind."""
    name, thing, place = NAMES[number % 8], THINGS[number // 8 % 8], PLACES[(number + number // 8 + number // 64) % 8]
    if kind == "story":
        met = f" {name} saw {thing} there." if number > 63 else ""
        return tokenizer.encode(f"One day, {name} went to {place}.{met}")
    words = ", ".join(random.Random(number).sample(WORDS, COPIED))
    copying, told = f"Copy this text exactly: {words}", f"Tell me a short story about {name} and {thing} in {place}."
    turns = [f"Repeat: {words}", words, copying] if kind == "again" else [copying if kind == "copying" else told]
    messages = [{"role": ("user", "assistant")[at % 2], "content": turn} for at, turn in enumerate(turns)]
    return tokenizer.encode(tokenizer.render_chat(messages), special=False)
