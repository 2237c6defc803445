"""Tokens per second of offline generation: one sequence, a batch of 16, 64 requests of mixed lengths, 64 behind one common beginning,
and, if asked for by name, 512 of 1,024 tokens in and 256 out, each through the engine, from token ids to text.

Every turn has a cache salt of its own, so that only requests of the same turn share cached beginnings; `cached_share` is the share of
prompt tokens that were found computed. With `--beside SETTING=VALUE` engines with that setting changed are measured in the same run, turn
by turn; `base_speedup` is the variant's seconds over the base's: above 1 the engine as given is the faster one (`turns`: turn by turn).

With `--peer PYTHON` that interpreter runs Hugging Face `generate` on the same weights, prompts and output lengths (`peer_hf.py`), as many
threads, in float32 and bfloat16, turn by turn with ours; many requests go to it in static batches, the size that suits it best.
Ratios are of medians; a missed goal makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from jaxinfer.bench import engines, peer_hf, variants
from jaxinfer.bench.rows import Report, add_output_arguments, spread
from jaxinfer.bench.workloads import DEFAULT, GOALS, NAMES, Goal, Workload, workloads
from jaxinfer.config import ConfigError, EngineConfig
from jaxinfer.config import add_arguments as add_settings
from jaxinfer.console import remark, warn

HELP = "tokens per second of offline generation, beside other settings or Hugging Face's on request"
PEER_DTYPES = ("float32", "bfloat16")


class Turn(NamedTuple):
    """One run of a workload: seconds, and how many prompt tokens were looked up in the prefix cache and found there."""

    seconds: float
    looked_up: int = 0
    found: int = 0


@dataclass(frozen=True)
class Side:
    """Somebody who runs workloads; `about` says in rows who."""

    about: dict[str, Any]
    run: Callable[[Workload], Turn]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter with torch and transformers; measures Hugging Face generate too")
    variants.add_beside_argument(parser)
    engines.add_shape_argument(parser)
    listed = f"measure this one; may be repeated [{' '.join(DEFAULT)}]"
    parser.add_argument("--workload", action="append", choices=NAMES, help=listed)
    parser.add_argument("--scale", type=float, default=1.0, help="shorten the outputs by this factor (a quick look) [1]")
    add_output_arguments(parser)
    add_settings(parser, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Measure every workload; 1 if a goal against the peer is missed."""
    if args.peer is not None and args.shape is not None:
        raise ConfigError("--peer needs a checkpoint to read; name one with --model instead of --shape")
    names = args.workload or DEFAULT
    longest = max(work.longest for work in workloads(names, vocab=2, scale=args.scale))
    chosen = variants.read(args.beside, engines.settings_of(args, longest))
    with ExitStack() as stack:
        built = stack.enter_context(engines.opened([variant.config for variant in chosen]))
        report = stack.enter_context(Report("throughput", args))
        peer = None if args.peer is None else stack.enter_context(_peer(args.peer, chosen[0].config))
        ours = [_ours(variant.name, engine) for variant, engine in zip(chosen, built, strict=True)]
        length, vocab = min(engine.info.max_model_len for engine in built), min(map(engines.vocabulary, built))
        reached = [
            _measure(report, work, ours, _theirs(peer, work), args.repeat) for work in workloads(names, vocab, length, args.scale)
        ]  # fmt: skip
    return int(not all(reached))


def _measure(report: Report, workload: Workload, ours: Sequence[Side], theirs: Sequence[Side], repeat: int) -> bool:
    """Measure all sides in turns (the first turn warms up and does not count); whether the goal against the peer is reached."""
    sides, turns = [*ours, *theirs], []
    for number in range(repeat + 1):
        remark(f"{workload.name}, turn {number} of {repeat}")
        turns.append([side.run(workload) for side in sides])
    columns = list(zip(*turns[1:], strict=True))
    medians = [_report_side(report, workload, side.about, column) for side, column in zip(sides, columns, strict=True)]
    for at in range(1, len(ours)):
        ratios = [round(other.seconds / base.seconds, 4) for other, base in zip(columns[at], columns[0], strict=True)]
        names = {"variant": ours[at].about["variant"], "base": variants.BASE}
        report.add(workload=workload.name, **names, base_speedup=medians[at] / medians[0], turns=ratios)
    their = [(side.about["dtype"], seconds) for side, seconds in zip(theirs, medians[len(ours) :], strict=True)]
    return _judge(report, workload, medians[0], their) if their else True


def _judge(report: Report, workload: Workload, ours: float, theirs: Sequence[tuple[str, float]]) -> bool:
    """Compare our median with the peer's best; whether the goal is reached."""
    float32 = min(seconds for dtype, seconds in theirs if dtype == "float32") / ours
    fastest, goal = min(seconds for _, seconds in theirs) / ours, GOALS[workload.name]
    reached = float32 >= (goal.float32 or 0) and fastest >= (goal.fastest or 0)
    goals = {"goal_float32": goal.float32, "goal_fastest": goal.fastest, "reached": reached if goal != Goal() else None}
    report.add(workload=workload.name, ratio_float32=float32, ratio_fastest=fastest, **goals)
    return reached


def _report_side(report: Report, workload: Workload, about: dict[str, Any], turns: Sequence[Turn]) -> float:
    timed, looked_up = spread([turn.seconds for turn in turns]), sum(turn.looked_up for turn in turns)
    size = {"requests": len(workload.prompts), "prompt_tokens": sum(map(len, workload.prompts)), "output_tokens": workload.tokens}
    cached = {"cached_share": sum(turn.found for turn in turns) / looked_up} if looked_up else {}
    report.add(workload=workload.name, **about, **size, tokens_per_second=workload.tokens / timed["seconds"], **cached, **timed)
    return timed["seconds"]


def _ours(name: str, engine: Any) -> Side:
    about = {"side": "jaxinfer", "variant": name, **engines.about(engine), "kv_tokens": engine.info.kv_tokens}
    return Side(about, partial(_run_ours, engine))


def _run_ours(engine: Any, workload: Workload) -> Turn:
    """Run the workload once.

    Raises:
        RuntimeError: a sequence did not get its tokens.
    """
    requests, scheduler = engines.requests(workload.prompts, workload.outputs), engine.scheduler
    looked_up, reused = scheduler.looked_up, scheduler.reused
    start = time.perf_counter()
    made = engines.run_all(engine, requests)
    seconds = time.perf_counter() - start
    if tuple(made[request.id] for request in requests) != workload.outputs:
        raise RuntimeError(f"{workload.name}: a sequence did not get exactly its tokens")
    return Turn(seconds, scheduler.looked_up - looked_up, scheduler.reused - reused)


def _peer(python: str, config: EngineConfig) -> Peer:
    from jaxinfer.checkpoint import hub

    return Peer(python, hub.resolve(config.model.model, config.model.revision))


def _theirs(peer: Peer | None, workload: Workload) -> list[Side]:
    """The peer in each dtype and static batch."""
    if peer is None:
        return []
    if not workload.batches:
        warn(f"{workload.name} is measured without the peer")

    def side(dtype: str, batch: int) -> Side:
        about = {"side": "peer", "dtype": dtype, "batch": batch, **peer.versions}
        return Side(about, lambda work: Turn(peer.run(work, dtype, batch)))

    return [side(dtype, batch) for dtype in PEER_DTYPES for batch in workload.batches]


class Peer:
    """The peer's process: it keeps its models between jobs and waits, idle, while ours runs.

    Raises:
        ConfigError: the interpreter cannot be started, or it fails (its own message stands on stderr).
    """

    def __init__(self, python: str, model: Path) -> None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._python = python
        try:
            self._process = subprocess.Popen(  # noqa: S603  the user names the interpreter
                [python, peer_hf.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise ConfigError(f"--peer {python}: {error.strerror}; name an interpreter that has torch and transformers") from None
        self.versions = self._ask({"model": str(model.resolve()), "threads": threads, "dtypes": PEER_DTYPES})["versions"]

    def run(self, workload: Workload, dtype: str, batch: int) -> float:
        """Seconds that the peer takes for a workload."""
        return self._ask({"dtype": dtype, "prompts": workload.prompts, "outputs": workload.outputs, "batch": batch})["seconds"]

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _ask(self, message: dict[str, Any]) -> Any:
        jobs, answers = self._process.stdin, self._process.stdout
        if jobs is None or answers is None:
            raise RuntimeError("the peer's process has no pipes")
        try:
            print(json.dumps(message), file=jobs, flush=True)
            return json.loads(answers.readline())
        except (BrokenPipeError, ValueError):
            self._end()
            raise ConfigError(f"--peer {self._python} failed; it must have torch and transformers") from None

    def _end(self) -> None:
        self._process.terminate()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()
