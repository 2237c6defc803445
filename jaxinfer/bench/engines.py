"""Engines for benchmarks that drive them directly, without a network: how they are chosen and opened, and requests made and run.

With `--shape NAME` an engine has random weights of a well-known model and no tokenizer. This file does not know what is measured.
"""

from __future__ import annotations

import argparse
import gc
import secrets
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxinfer.config import ConfigError, EngineConfig
from jaxinfer.console import StageBar
from jaxinfer.models import find
from jaxinfer.request import QueueFull, Request, SamplingParams


def add_shape_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--shape`."""
    parser.add_argument("--shape", metavar="NAME", help="random weights of a well-known model (see `jaxinfer models`), instead of --model")


def settings_of(args: argparse.Namespace, longest: int) -> dict[str, Any]:
    """The engine's settings that the flags give; a shape's context is no longer than needed, since page tables are as wide as it.

    Raises:
        ConfigError: no such shape.
    """
    values = vars(args)
    if args.shape is None:
        return values
    length = min(longest, find.find_shape(args.shape)["max_position_embeddings"])
    return {"max_model_len": length, **values, "model": args.shape, "load_format": "random"}


@contextmanager
def opened(configs: Sequence[EngineConfig]) -> Iterator[list[Any]]:
    """An engine for each config, shut down at the end. What they have in common is compiled once. As in a server, Python's collector passes
    over what is there when they are ready.

    Raises:
        ConfigError: several engines from one bundle, which would all have its settings.
    """
    if len(configs) > 1 and any(config.execution.bundle is not None for config in configs):
        raise ConfigError("--bundle brings its own settings, so engines with others cannot be measured beside; leave it out")
    from jaxinfer import devices
    from jaxinfer.engine.engine import Engine
    from jaxinfer.step import executable

    devices.prepare(max(config.execution.mesh.size for config in configs))
    with ExitStack() as stack:
        engines = []
        with StageBar() as bar, executable.sharing():
            for config in configs:
                engines.append(Engine(config, progress=bar))
                stack.callback(engines[-1].shutdown)
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        yield engines


def about(engine: Any) -> dict[str, Any]:
    """What a row says about an engine."""
    return {"model": engine.info.model, "dtype": engine.info.dtype, "kv_dtype": engine.info.kv_dtype, "mesh": engine.info.mesh}


def vocabulary(engine: Any) -> int:
    """How many token ids may be drawn for prompts; a model may have more, which mean nothing to its tokenizer."""
    return engine.program.config.vocab if engine.tokenizer is None else engine.tokenizer.vocab_size


def requests(prompts: Iterable[Sequence[int]], outputs: Iterable[int]) -> list[Request]:
    """Greedy requests for exactly so many tokens. Each call has a salt of its own: only these share cached beginnings with each other."""
    salt = secrets.token_hex(8)
    made = []
    for number, (prompt, count) in enumerate(zip(prompts, outputs, strict=True)):
        params = SamplingParams.of(temperature=0.0, max_tokens=count, ignore_eos=True)
        made.append(Request(f"bench-{number}", tuple(prompt), params, cache_salt=salt))
    return made


def run_all(engine: Any, requests: Iterable[Request]) -> Counter[str]:
    """Hand requests in, as fast as the engine takes them, and step until all are done; how many tokens each got, by id."""
    waiting, made = deque(requests), Counter[str]()
    while waiting or engine.has_work:
        while waiting:
            try:
                engine.add(waiting[0])
            except QueueFull:
                break
            waiting.popleft()
        for output in engine.step():
            made[output.request_id] += len(output.token_ids)
    return made
