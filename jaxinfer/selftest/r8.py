"""R8, nothing compiles once the engine is ready: mixed requests while JAX is listened to, and two starts on one compilation cache.

The starts are processes of their own that share an empty cache folder: the first compiles everything, the second must not. They come
first, while this process has not taken the accelerator.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

from jaxinfer.config import EngineConfig
from jaxinfer.console import remark
from jaxinfer.request import Request
from jaxinfer.selftest import r4, stand
from jaxinfer.selftest.stand import Schedule, Stand, Verdict

PROMISE = "no compile after ready, and none in a start from a warm compilation cache"
ENGINE = True
REQUESTS = {"long": 10_000, "quick": 300}
BATCH = 150
COMPILED = "/jax/core/compile/backend_compile_duration"  # also when the persistent cache has it
MISSED = "/jax/compilation_cache/cache_misses"


@dataclass
class Ear:
    """Counts what JAX reports since it was made; listeners cannot be taken away, so `closed` makes it deaf."""

    compiled: int = 0
    missed: int = 0
    closed: bool = False

    @classmethod
    def open(cls) -> Ear:
        """Begin to listen."""
        import jax

        ear = cls()
        jax.monitoring.register_event_duration_secs_listener(lambda event, duration_secs, **_: ear._hear(event))
        jax.monitoring.register_event_listener(lambda event, **_: ear._hear(event))
        return ear

    def _hear(self, name: str) -> None:
        self.compiled += not self.closed and name == COMPILED
        self.missed += not self.closed and name == MISSED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this row."""
    parser.add_argument("--requests", type=int, help="mixed requests [10,000; 300 with --quick]")
    parser.add_argument("--skip-starts", action="store_true", help="do not measure cold and warm starts")
    parser.add_argument("--start-only", action="store_true", help="start the engine, say how long it took, end")
    stand.add_arguments(parser)


def run(args: argparse.Namespace) -> Verdict:
    """Measure the starts, then listen while requests run."""
    if args.start_only:
        return start(vars(args))
    starts = {} if args.skip_starts else both_starts(stand.settings(vars(args)))
    verdict = check(stand.build(vars(args)), args.requests or REQUESTS["quick" if args.quick else "long"], args.seed)
    warm = starts.get("warm", {}).get("cache_misses", 0)
    return Verdict(verdict.counts | {"starts": starts}, verdict.passed and not warm)


def check(tested: Stand, requests: int, seed: int) -> Verdict:
    """Run mixed requests in batches, each behind another schedule, and count compiles."""
    draw, done, ear = random.Random(seed), 0, Ear.open()
    while done < requests:
        batch = mixed(draw, tested, min(BATCH, requests - done))
        schedule = draw.choice(
            (Schedule(leavers=5), Schedule(pages=r4.scarce(batch, tested)), Schedule(chunk=7), Schedule(rounds=2), Schedule(overlap=False))
        )
        tested.run(batch, schedule, draw)
        tested.restore()
        tested.engine.program.wipe_pages([(0, 1)])  # as after numbers that are not finite; nobody owns the page now
        done += len(batch) * schedule.rounds
        remark(f"{done:,} of {requests:,} requests, {ear.compiled} compiles")
    ear.closed = True
    figures = {"requests": done, "compiles": ear.compiled, "cache_misses": ear.missed, "listener_works": heard()}
    return Verdict(figures, figures["listener_works"] and not ear.compiled)


def mixed(draw: random.Random, tested: Stand, count: int) -> list[Request]:
    """Requests of every kind, half of them without log probabilities."""
    found = r4.variety(draw, count, tested)[:count]
    return [replace(r, params=replace(r.params, logprobs=draw.choice((None, 0, 3, 20)))) if draw.random() < 0.7 else r for r in found]


def heard() -> bool:
    """Whether a compile is heard at all."""
    import jax

    ear = Ear.open()
    jax.jit(lambda x: x * 3 + 1)(1.5)
    ear.closed = True
    return ear.compiled > 0


def start(values: dict[str, Any]) -> Verdict:
    """Start an engine as a process of its own."""
    begun, ear = time.perf_counter(), Ear.open()
    tested = stand.build(values)
    seconds = round(time.perf_counter() - begun, 2)
    figures = {"ready_seconds": seconds, "cache_misses": ear.missed, "programs": tested.engine.info.programs}
    return Verdict(figures, True)


def both_starts(config: EngineConfig) -> dict[str, Any]:
    """Seconds and cache misses of a start with an empty compilation cache, and of one after it."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            remark(f"a {name} start")
            begun = time.perf_counter()
            found[name] = _start_process(replace(config, execution=replace(config.execution, compilation_cache="on")), folder)
            found[name]["process_seconds"] = round(time.perf_counter() - begun, 2)
    return found


def _start_process(config: EngineConfig, folder: str) -> dict[str, Any]:
    environment = [shutil.which("env") or "env", f"JAXINFER_CACHE_DIR={folder}"]
    command = [*environment, sys.executable, "-m", "jaxinfer", "selftest", "R8", "--start-only", *stand.flags(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  the flags are our own
    if done.returncode:
        raise RuntimeError(f"a start failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)["counts"]
