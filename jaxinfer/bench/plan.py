"""The planner's predictions beside what a real start reports and what decode steps really take, on the machine at hand.

For each kind of weights the model is planned in a process of its own, as `jaxinfer plan` does, for the slice that this machine is; then an
engine with the same settings is started and timed. A row holds a prediction, the measurement and their ratio: memory is to be
met within 3 %, on accelerators decode steps within 15 % (a CPU's predicted times are assumptions: told, not judged; so is what programs
alone take on a GPU, see `_memory`). The exit code is 1 if a row that is judged is further off. This file does not predict or time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from jaxinfer.bench import engines, latency
from jaxinfer.bench.latency import Load
from jaxinfer.bench.rows import Report, add_output_arguments
from jaxinfer.config import ConfigError, EngineConfig, from_arguments
from jaxinfer.config import add_arguments as add_settings
from jaxinfer.console import remark

HELP = "the planner's predictions beside a real start and real decode steps"
LOADS = (Load(1, 600), Load(64, 600), Load(256, 600))
SCHEMES = ("none", "int8")
MEMORY, TIME = 0.03, 0.15  # how far off a prediction may be


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    engines.add_shape_argument(parser)
    parser.add_argument("--slice", metavar="NAME", help="what this machine is to the planner [what jax shows]")
    parser.add_argument("--schemes", default=",".join(SCHEMES), metavar="LIST", help=f"weights: none, or a scheme [{','.join(SCHEMES)}]")
    rows = f"decode rows [{' '.join(map(str, LOADS))}]"
    parser.add_argument("--decode", action="append", type=latency.parse_load, metavar="BxC", help=rows)
    parser.add_argument("--steps", type=int, default=32, help="decode steps in one measurement [32]")
    parser.add_argument("--all", action="store_true", help="the plan compiles every program in full")
    add_output_arguments(parser)
    add_settings(parser, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Compare for each kind of weights; 1 if a judged row is too far off."""
    if hasattr(args, "quantize"):
        raise ConfigError(f"--quantize {args.quantize}: this benchmark goes through --schemes; write --schemes {args.quantize}")
    with Report("plan", args) as report:
        for scheme in args.schemes.split(","):
            for row in _rows(args, None if scheme == "none" else scheme):
                report.add(weights=scheme, **row)
    return int(any(row["within"] is False for row in report.rows))


def _rows(args: argparse.Namespace, scheme: str | None) -> Iterator[dict[str, Any]]:
    from jaxinfer import devices
    from jaxinfer.bench import ceilings
    from jaxinfer.planner import planning, slices
    from jaxinfer.planner.outcome import Wanted

    settings = _settings(args, scheme)
    config = from_arguments(EngineConfig, settings)
    devices.prepare(config.execution.mesh.size)
    first = devices.select(config.execution.mesh.size)[0]
    chip = devices.find_chip(devices.label(first))
    piece = args.slice or slices.of_devices("cpu" if chip is None else chip.name, config.execution.mesh.size).name
    remark(f"planning {config.model.model} for {piece}, weights {scheme or 'as they are'}")
    own = {name: value for name, value in settings.items() if name not in ("mesh", "max_model_len", "model")}
    wanted = Wanted(context=config.model.max_model_len, mesh=config.execution.mesh, all=args.all)
    plan = planning.run(config.model.model, piece, wanted, own)
    if plan.failure is not None:
        raise ConfigError(f"no plan for {piece}: {plan.failure}")
    with engines.opened([config]) as (engine,):
        yield from _memory(plan, engine.info, devices.memory_in_use(first), chosen_there=first.platform == "gpu")
        judged = TIME if first.platform != "cpu" else None
        predictor, ceiling = _predictor(engine, plan), ceilings.measure(engine.info.dtype)
        for load in latency.fitting(engine, args.decode or LOADS, args.steps * (args.repeat + 1)):
            found = latency.time_decode(engine, load, args, ceiling)
            made = predictor.decode(load.batch / config.execution.mesh.data, found["context"])
            yield _row(f"decode {load} ms", made.seconds * 1e3, found["milliseconds"], judged)


def _settings(args: argparse.Namespace, scheme: str | None) -> dict[str, Any]:
    """The engine's settings: contexts no longer than the rows need."""
    from jaxinfer.config import engine_settings
    from jaxinfer.planner import planning, sizing

    given = {name: value for name, value in vars(args).items() if name in engine_settings()}
    given |= {} if args.shape is None else {"model": args.shape, "load_format": "random"}
    longest = sizing.longest(planning.read_shape(given.get("model", "demo"), given.get("revision")))
    needed = max(load.tokens + load.batch for load in args.decode or LOADS) + args.steps * (args.repeat + 2)
    return {"max_model_len": min(longest, needed), **given, **({} if scheme is None else {"quantize": scheme})}


def _memory(plan: Any, info: Any, in_use: int | None, *, chosen_there: bool) -> Iterator[dict[str, Any]]:
    """chosen_there: XLA chooses kernels on the device itself, and what they work in is not known before; it counts in the sum."""
    memory, wanted = plan.memory, ("weights", "programs", "kv_pool")
    yield _row("weights, bytes a device", memory["weights"], info.weight_bytes, MEMORY)
    yield _row("programs, bytes a device", memory["programs"], info.program_bytes, None if chosen_there else MEMORY)
    real = info.weight_bytes + info.program_bytes + info.kv_bytes
    yield _row("weights, programs and KV pool, bytes a device", sum(memory[name] for name in wanted), real, MEMORY)
    yield _row("KV pool, bytes a device", memory["kv_pool"], info.kv_bytes, MEMORY)
    yield _row("KV tokens", plan.capacity["kv_tokens"], info.kv_tokens, MEMORY)
    if in_use is not None:  # what lies there between steps
        yield _row("in use, bytes a device", memory["weights"] + memory["slots"] + memory["kv_pool"], in_use, MEMORY)


def _predictor(engine: Any, plan: Any) -> Any:
    """The planner's own, for rows and contexts that the plan was not made for."""
    from jaxinfer import devices
    from jaxinfer.planner.predict import Kernels, Predictor
    from jaxinfer.planner.topology import CPU

    config, chosen = engine.program.config, plan.settings
    kernels = Kernels(chosen["attention"], chosen["matmul"], chosen["weights"])
    tokens = max(bucket.prefill_tokens for bucket in config.buckets)
    per_token = plan.memory["kv_token"]
    chip = devices.find_chip(engine.info.device) or CPU
    return Predictor(
        graph=config.graph, placement=config.placement, chip=chip, kernels=kernels, kv_token=per_token, step_tokens=tokens,
        codes=config.pool.codes is not None,
    )  # fmt: skip


def _row(what: str, predicted: float, measured: float, limit: float | None) -> dict[str, Any]:
    ratio = predicted / measured
    return {
        "row": what, "predicted": predicted, "measured": measured, "ratio": ratio, "limit": limit,
        "within": None if limit is None else abs(ratio - 1) <= limit,
    }  # fmt: skip
