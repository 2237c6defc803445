"""Time of a decode step and of a prefill through the real engine, beside the floor that the machine sets.

`--shape NAME` takes random weights of a well-known model. A decode row is BATCHxCONTEXT: so many sequences of about so many tokens,
one new token each in a step; its floor is (weights + KV read) / bandwidth. Its host gap is the share of a step in which the devices wait
for the host: what launch-to-launch time exceeds that of the same step launched over and over. A prefill row is BATCHxPROMPT, from handing
in to the last first token; its floor is operations / matmul rate. Both ceilings are measured in the same run. Rows that the engine cannot
hold are left out with a word on stderr. `--kernels N` says where a GPU's time goes.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from statistics import median
from typing import Any, NamedTuple

from jaxinfer.bench import engines
from jaxinfer.bench.rows import Report, add_output_arguments
from jaxinfer.config import EngineConfig, from_arguments
from jaxinfer.config import add_arguments as add_settings
from jaxinfer.console import remark, warn
from jaxinfer.request import Request

HELP = "decode step and prefill time, beside their floors"


class Load(NamedTuple):
    """So many sequences of so many tokens each."""

    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}"


PROFILED = 8  # decode steps
DECODES = (Load(1, 600), Load(16, 600), Load(64, 600), Load(256, 600), Load(64, 4180))
PREFILLS = (Load(1, 2048), Load(1, 8000), Load(8, 4096))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    engines.add_shape_argument(parser)
    repeated = {"action": "append", "type": parse_load}
    parser.add_argument("--decode", **repeated, metavar="BxC", help=f"decode rows; may be repeated [{_list(DECODES)}]")
    parser.add_argument("--prefill", **repeated, metavar="BxP", help=f"prefill rows; may be repeated [{_list(PREFILLS)}]")
    parser.add_argument("--steps", type=int, default=32, help="decode steps in one measurement [32]")
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="on a GPU: behind each row its N longest kernels [0]")
    add_output_arguments(parser)
    add_settings(parser, EngineConfig)


def run(args: argparse.Namespace) -> int:
    """Measure every row that fits."""
    from jaxinfer.bench import ceilings

    with engines.opened([_settings(args)]) as (engine,), Report("latency", args) as report:
        ceiling = ceilings.measure(engine.info.dtype)
        report.add(row="ceiling", **ceiling.fields())
        about = engines.about(engine)
        for load in fitting(engine, _decodes(args), args.steps * (args.repeat + 1)):
            report.add(row="decode", load=str(load), **about, **time_decode(engine, load, args, ceiling))
            _add_kernels(report, load, args.kernels, PROFILED, partial(_steps_alone, engine, PROFILED))
        for load in fitting(engine, _prefills(args), 1):
            report.add(row="prefill", load=str(load), **about, **_prefill(engine, load, args, ceiling))
            _add_kernels(report, load, args.kernels, 1, partial(_prefill_once, engine, load))
    return 0


def _add_kernels(report: Report, load: Load, most: int, steps: int, run: Callable[[], Any]) -> None:
    """A row for each of the kernels that so many steps spend most of their time in, by the device's clock."""
    from pallas_kernels import device_clock

    found = device_clock.by_name(device_clock.spans_of(run)) if most else []
    if most and not found:
        warn("--kernels: no profile of this device says which kernels ran; it needs an NVIDIA GPU with CUPTI")
    together = sum(kernel.seconds for kernel in found)
    for name, count, seconds in found[:most]:
        shares = {"count": count / steps, "microseconds": seconds / steps * 1e6, "share": seconds / together}
        report.add(row="kernel", load=str(load), kernel=name, **shares)


def _settings(args: argparse.Namespace) -> EngineConfig:
    longest = max([load.tokens + load.batch + args.steps * (args.repeat + 2) for load in [*_decodes(args), *_prefills(args)]])
    return from_arguments(EngineConfig, engines.settings_of(args, longest))


def _decodes(args: argparse.Namespace) -> Sequence[Load]:
    return args.decode or (() if args.prefill else DECODES)


def _prefills(args: argparse.Namespace) -> Sequence[Load]:
    return args.prefill or (() if args.decode else PREFILLS)


def fitting(engine: Any, loads: Sequence[Load], outputs: int) -> Iterator[Load]:
    """The loads that the engine holds with so many new tokens each; a word on stderr for each of the others."""
    config, info = engine.program.config, engine.info
    for load in loads:
        length = load.tokens + outputs
        if length > info.max_model_len or load.batch > config.max_sequences or load.batch * length > info.kv_tokens:
            warn(f"{load} is left out: the engine holds {config.max_sequences} x {info.max_model_len} tokens, {info.kv_tokens} in all")
        else:
            remark(f"measuring {load}")
            yield load


def time_decode(engine: Any, load: Load, args: argparse.Namespace, ceiling: Any) -> dict[str, Any]:
    """Fill the engine until every sequence decodes, then time steps.

    Raises:
        RuntimeError: a timed step did not decode all of them.
    """
    for request in _requests(engine, load, 1 << 20):
        engine.add(request)
    while len({output.request_id for output in engine.step()}) < load.batch or engine.scheduler.waiting:
        pass
    runs, lengths = [], []
    for _ in range(args.repeat + 1):  # the first warms up
        start = time.perf_counter()
        outputs = [engine.step() for _ in range(args.steps)]
        runs.append((time.perf_counter() - start) / args.steps)
        if any(len(step) != load.batch for step in outputs):
            raise RuntimeError(f"{load}: a sequence did not decode in every step; the engine preempted or ended it")
        lengths.append(sum(output.prompt_tokens + output.output_tokens for output in outputs[args.steps // 2]) / load.batch)
    device = _device_seconds(engine, args.steps)
    _clear(engine)
    context = sum(lengths[1:]) / args.repeat
    floor = ceiling.decode_floor(_weights_read(engine, load.batch) + load.batch * context * _kv_bytes(engine)) / engine.info.device_count
    seconds = median(runs[1:])
    gap = {"device_milliseconds": device * 1e3, "host_gap_share": max(0.0, 1 - device / seconds)}
    return {"context": round(context), "tokens_per_second": load.batch / seconds, **_timed(seconds, floor, runs[1:]), **gap}


def _device_seconds(engine: Any, steps: int) -> float:
    """Time of the engine's current step on the devices alone."""
    _steps_alone(engine, 1)
    start = time.perf_counter()
    _steps_alone(engine, steps)
    return (time.perf_counter() - start) / steps


def _steps_alone(engine: Any, steps: int) -> None:
    """Launch the engine's current step so many times without looking at what comes out."""
    import jax

    from jaxinfer.step.forward import Demand

    program, packed = engine.program, engine.last_packed
    draw = program.verify if packed.shapes.bucket.decode_tokens > 1 else program.sample
    launched = [draw(program.forward(packed), Demand.GREEDY) for _ in range(steps)]
    jax.block_until_ready(launched[-1])


def _prefill(engine: Any, load: Load, args: argparse.Namespace, ceiling: Any) -> dict[str, Any]:
    """Time from handing prompts in to the last of their first tokens, and to the return of the first step (the host's share: what an idle
    device waits for, and the launches that it overlaps with); no run finds what another computed."""
    runs, launches = [], []
    for _ in range(args.repeat + 1):
        seconds, launch = _prefill_once(engine, load)
        runs.append(seconds)
        launches.append(launch)
    seconds, floor = median(runs[1:]), ceiling.compute_floor(_prefill_operations(engine, load)) / engine.info.device_count
    launched = {"launch_milliseconds": median(launches[1:]) * 1e3}  # with overlap off the first step is awaited in it
    return {"context": load.tokens, "tokens_per_second": load.batch * load.tokens / seconds, **_timed(seconds, floor, runs[1:]), **launched}


def _prefill_once(engine: Any, load: Load) -> tuple[float, float]:
    """Seconds until the last first token, and until the first step returned."""
    requests = _requests(engine, load, 1)
    start = time.perf_counter()
    for request in requests:
        engine.add(request)
    engine.step()
    launch = time.perf_counter() - start
    while engine.has_work:
        engine.step()
    return time.perf_counter() - start, launch


def _timed(seconds: float, floor: float, runs: list[float]) -> dict[str, Any]:
    return {"milliseconds": seconds * 1e3, "floor_milliseconds": floor * 1e3, "share_of_floor": floor / seconds, "runs": runs}


def _requests(engine: Any, load: Load, outputs: int) -> list[Request]:
    """The same prompts each time, under a new salt."""
    draw, vocab = random.Random(load.tokens), engine.program.config.graph.config.vocab_size
    prompts = [[draw.randrange(vocab) for _ in range(load.tokens)] for _ in range(load.batch)]
    return engines.requests(prompts, [min(outputs, engine.info.max_model_len - load.tokens)] * load.batch)


def _clear(engine: Any) -> None:
    """End whatever still runs, so that the next row starts from an empty engine."""
    for number in range(engine.scheduler.running):
        engine.abort(f"bench-{number}")
    while engine.has_work:
        engine.step()


def _weights_read(engine: Any, rows: int) -> float:
    """Bytes of weights that a decode step reads: all but an embedding table of its own (a few rows of it) and experts that none chose."""
    from jaxinfer.models.experts import share_met
    from jaxinfer.models.graph import arrays_of

    graph = engine.program.config.graph
    sizes = {
        name: sum(array.nbytes * share_met(array, graph.config, rows) for array in arrays_of(spec))
        for name, spec in zip(graph.names, graph.specs, strict=True)
    }
    return sum(sizes.values()) - (sizes["embedding.weight"] if "lm_head.weight" in sizes else 0)


def _kv_bytes(engine: Any) -> float:
    """Bytes of keys and values of one token, over all layers of the model itself."""
    import jax

    config = engine.program.config
    own = config.kv_specs[: len(config.graph.config.attention_shapes)]
    return sum(spec.nbytes for spec in jax.tree.leaves(own)) / (config.pool.all_pages * config.pool.page_size)


def _prefill_operations(engine: Any, load: Load) -> float:
    """Multiplies and adds of the matmuls with weights and of causal attention (half of the score matrix)."""
    from jaxinfer.models.experts import share_used
    from jaxinfer.models.graph import arrays_of

    graph = engine.program.config.graph
    weights = zip(graph.names, graph.specs, graph.contracting, strict=True)
    dense = sum(
        prod(spec.shape) * share_used(arrays_of(spec)[0], graph.config)
        for name, spec, contracting in weights
        if contracting and name != "lm_head.weight"
    )
    attention = sum(2 * shape.heads * shape.head_dim * load.tokens**2 for shape in graph.config.attention_shapes)
    return load.batch * (2 * dense * load.tokens + attention)


def parse_load(text: str) -> Load:
    """Read BATCHxTOKENS, as a flag's type."""
    batch, _, tokens = text.partition("x")
    if not batch.isdigit() or not tokens.isdigit() or not int(batch) or not int(tokens):
        raise argparse.ArgumentTypeError(f"{text!r} is not BATCHxTOKENS; write for example 16x600")
    return Load(int(batch), int(tokens))


def _list(loads: Sequence[Load]) -> str:
    return " ".join(map(str, loads))
