"""How long an engine takes to be ready, how much of that after its weights are read, and how many programs it compiles.

With `--bundle DIR` programs are loaded: this is the command that checks a bundle on the machine that it was made for. It exits with 1 if
anything is compiled all the same (a kernel that starts the runtime for Hopper GPUs aside; random weights are made by small programs and not
judged). With `--compare` the same engine starts once more without the bundle, and both must generate the same tokens.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any, NamedTuple

from jaxinfer.bench import engines
from jaxinfer.bench.rows import Report, add_output_arguments
from jaxinfer.config import ConfigError, EngineConfig, from_arguments
from jaxinfer.config import add_arguments as add_settings
from jaxinfer.console import StageBar, warn

HELP = "time until an engine is ready, and what it compiles; checks a bundle"
EVENT = "/jax/core/compile/backend_compile_duration"
PROMPTS, LENGTH, OUTPUT = 4, 24, 16


class Start(NamedTuple):
    """What one start took, and what the engine generated then."""

    row: dict[str, Any]
    tokens: list[list[int]]
    compilations: int
    config: EngineConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    engines.add_shape_argument(parser)
    parser.add_argument("--compare", action="store_true", help="start without the bundle too; both must generate the same tokens")
    add_output_arguments(parser)
    add_settings(parser, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Start once, or twice with --compare; see the module for the exit code."""
    config = from_arguments(EngineConfig, engines.settings_of(args, 1 << 30))
    bundle = config.execution.bundle
    if args.compare and bundle is None:
        raise ConfigError("--compare compares a start from a bundle with one without; add --bundle DIR")
    first = start(config, "compiled" if bundle is None else "bundle")  # before the report asks for devices: a bundle says how many
    with Report("startup", args) as report:
        report.add(**first.row)
        wrong = bundle is not None and config.model.load_format != "random" and first.compilations > first.row["expected_compilations"]
        if wrong:
            warn(f"{first.compilations} programs were compiled although they are in the bundle")
        if bundle is not None and args.compare:
            plain = replace(first.config, execution=replace(first.config.execution, bundle=None))
            second = start(plain, "compiled")
            report.add(**second.row, same_tokens=first.tokens == second.tokens)
            wrong |= first.tokens != second.tokens
    return int(wrong)


def start(config: EngineConfig, way: str) -> Start:
    """Build an engine, let it generate, and shut it down."""
    import jax

    from jaxinfer.engine.engine import Engine

    seen: list[float] = []
    read = [0.0]

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == EVENT:
            seen.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    begun = time.perf_counter()
    with StageBar() as bar:

        def progress(stage: str, done: int, total: int) -> None:
            if stage == "read" and done == total:
                read[0] = time.perf_counter()
            bar(stage, done, total)

        engine = Engine(config, progress=progress)
    ready = time.perf_counter()
    try:
        generating, tokens = time.perf_counter(), _generated(engine)
        row = {
            "row": way, "ready_seconds": ready - begun, "after_weights_seconds": ready - read[0] if read[0] else None,
            "programs": engine.info.programs, "compilations": len(seen),
            "expected_compilations": int(_mosaic(engine)), "generate_seconds": time.perf_counter() - generating, **engines.about(engine),
        }  # fmt: skip
    finally:
        engine.shutdown()
        jax.monitoring.unregister_event_duration_listener(listen)
    return Start(row, tokens, len(seen), engine.config)


def _mosaic(engine: Any) -> bool:
    bundle = getattr(engine.program.source, "bundle", None)
    return bundle is not None and bundle.mosaic


def _generated(engine: Any) -> list[list[int]]:
    """Greedy tokens for a few prompts at once."""
    length = min(LENGTH, engine.info.max_model_len // 2)
    count = min(OUTPUT, engine.info.max_model_len - length)
    prompts = [[(7 * number + 3 * place) % engines.vocabulary(engine) for place in range(length)] for number in range(PROMPTS)]
    made: dict[str, list[int]] = {}
    for request in engines.requests(prompts, [count] * PROMPTS):
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            made.setdefault(output.request_id, []).extend(output.token_ids)
    return [made[name] for name in sorted(made)]
