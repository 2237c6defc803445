"""Tokens per second of offline generation: one sequence, a batch of 16, and 64 requests of mixed lengths through the engine.

With `--peer PYTHON` that interpreter runs Hugging Face `generate` on the same weights, prompts and output lengths (`peer_hf.py`), as many
threads, in float32 and bfloat16, turn by turn with ours; the mixed requests go to it in static batches, the size that suits it best.
Ratios are of medians; a missed goal makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxinfer.bench import peer_hf
from jaxinfer.bench.rows import Report, add_output_arguments, spread
from jaxinfer.config import ConfigError, EngineConfig, from_arguments
from jaxinfer.config import add_arguments as add_settings
from jaxinfer.console import StageBar, remark

HELP = "tokens per second of offline generation, beside Hugging Face's on request"
PEER_DTYPES = ("float32", "bfloat16")
STATIC_BATCHES = (16, 64)


@dataclass(frozen=True)
class Workload:
    """Prompts and how many tokens each shall get. `batches` are the static batch sizes that the peer may try."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]
    batches: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens to generate."""
        return sum(self.outputs)


@dataclass(frozen=True)
class Goal:
    """How much faster than the peer we mean to be: than its float32, and than its fastest dtype (None: reported without a goal)."""

    float32: float
    fastest: float | None


GOALS = {"batch-1": Goal(1.5, 1.2), "batch-16": Goal(1.2, None), "mixed-64": Goal(2.0, None)}


def workloads(vocab: int, length: int, scale: float = 1.0) -> tuple[Workload, ...]:
    """The three workloads, random tokens of a fixed seed, cut to a context of `length`. `scale` shortens outputs (tests)."""
    draw = random.Random(0)

    def prompts(lengths: list[int]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(draw.randrange(vocab // 16, vocab) for _ in range(max(1, min(n, length // 2)))) for n in lengths)

    def outputs(lengths: list[int]) -> tuple[int, ...]:
        return tuple(max(1, min(int(n * scale), length // 2)) for n in lengths)

    mixed = [draw.randrange(16, 256) for _ in range(64)], [draw.randrange(16, 128) for _ in range(64)]
    return (
        Workload("batch-1", prompts([32]), outputs([128]), (1,)),
        Workload("batch-16", prompts([32] * 16), outputs([128] * 16), (16,)),
        Workload("mixed-64", prompts(mixed[0]), outputs(mixed[1]), STATIC_BATCHES),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter with torch and transformers; measures Hugging Face generate too")
    parser.add_argument("--workload", action="append", choices=tuple(GOALS), help="measure this one only; may be repeated")
    parser.add_argument("--scale", type=float, default=1.0, help="shorten the outputs by this factor (a quick look) [1]")
    add_output_arguments(parser)
    add_settings(parser, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Measure every workload; 1 if a goal against the peer is missed."""
    from jaxinfer.api import LLM
    from jaxinfer.checkpoint import hub

    settings = from_arguments(EngineConfig, vars(args))
    with StageBar() as bar:
        llm = LLM.build(settings, progress=bar)
    with llm, Report("throughput", args) as report:
        info = llm.engine.info
        chosen = [w for w in workloads(llm.tokenizer.vocab_size, info.max_model_len, args.scale) if w.name in (args.workload or GOALS)]
        if args.peer is None:
            for workload in chosen:
                _report_side(report, workload, _ours(info), [_run_ours(llm, workload) for _ in range(args.repeat + 1)][1:])
            return 0
        with Peer(args.peer, hub.resolve(settings.model.model, settings.model.revision)) as peer:
            return int(not all([_compare(report, llm, peer, workload, args.repeat) for workload in chosen]))


def _compare(report: Report, llm: Any, peer: Peer, workload: Workload, repeat: int) -> bool:
    """Measure both sides in turns (the first turn warms up and does not count); whether the goal is reached."""
    contests = [(dtype, batch) for dtype in PEER_DTYPES for batch in workload.batches]
    times: dict[Any, list[float]] = {}
    for turn in range(repeat + 1):
        remark(f"{workload.name}, turn {turn} of {repeat}")
        times.setdefault("ours", []).append(_run_ours(llm, workload))
        for dtype, batch in contests:
            times.setdefault((dtype, batch), []).append(peer.run(workload, dtype, batch))
    medians = {}
    for side, seconds in times.items():
        described = _ours(llm.engine.info) if side == "ours" else {"side": "peer", "dtype": side[0], "batch": side[1], **peer.versions}
        medians[side] = _report_side(report, workload, described, seconds[1:])
    ours = medians.pop("ours")
    float32 = min(seconds for (dtype, _), seconds in medians.items() if dtype == "float32") / ours
    fastest, goal = min(medians.values()) / ours, GOALS[workload.name]
    reached = float32 >= goal.float32 and (goal.fastest is None or fastest >= goal.fastest)
    goals = {"goal_float32": goal.float32, "goal_fastest": goal.fastest, "reached": reached}
    report.add(workload=workload.name, ratio_float32=float32, ratio_fastest=fastest, **goals)
    return reached


def _report_side(report: Report, workload: Workload, side: dict[str, Any], seconds: list[float]) -> float:
    timed = spread(seconds)
    size = {"requests": len(workload.prompts), "prompt_tokens": sum(map(len, workload.prompts)), "output_tokens": workload.tokens}
    report.add(workload=workload.name, **side, **size, tokens_per_second=workload.tokens / timed["seconds"], **timed)
    return timed["seconds"]


def _ours(info: Any) -> dict[str, Any]:
    return {"side": "jaxinfer", "model": info.model, "dtype": info.dtype, "mesh": info.mesh}


def _run_ours(llm: Any, workload: Workload) -> float:
    """Seconds for the workload, from token ids to text.

    Raises:
        RuntimeError: a sequence did not get its tokens.
    """
    pairs = zip(workload.prompts, workload.outputs, strict=True)
    requests = [llm.request(prompt, temperature=0.0, max_tokens=length, ignore_eos=True) for prompt, length in pairs]
    start = time.perf_counter()
    made = [len(completion.token_ids) for completion in llm.complete(requests)]
    seconds = time.perf_counter() - start
    if tuple(made) != workload.outputs:
        raise RuntimeError("a sequence ended before it had its tokens")
    return seconds


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
