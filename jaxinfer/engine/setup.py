"""From settings to a compiled, loaded program: the engine's start-up, in order.

Find the model, read its configuration, describe its weights, arrange the mesh, size the KV pool by arithmetic (a model that cannot
fit is refused before a weight is read) and, where memory is tight, by what the compiler says the largest programs need; compile every
program while the weights are read, then load. Nothing here runs again once the engine is ready. This file does not know about requests.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer import devices
from jaxinfer.cache.kv import CODES, PoolShape
from jaxinfer.cache.pages import PagePool
from jaxinfer.cache.prefix import PrefixIndex
from jaxinfer.checkpoint import hub, read
from jaxinfer.config import ConfigError, EngineConfig, cache_dir
from jaxinfer.engine.scheduler import Limits, Scheduler
from jaxinfer.models import find
from jaxinfer.models.graph import Graph, Quantization, random_weights
from jaxinfer.models.layers import Placement
from jaxinfer.planner.memory import Demand, MemoryPlan, check_programs, plan_memory
from jaxinfer.request import RequestError, SamplingParams
from jaxinfer.sharding import DEFAULT_RULES, make_mesh
from jaxinfer.step.buckets import Bucket, buckets, fixed
from jaxinfer.step.program import Program, ProgramConfig
from jaxinfer.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]  # stage (read: bytes, compile: programs), done, total; from any thread

logger = logging.getLogger(__name__)

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class EngineInfo:
    """What is running, for people: names, sizes in tokens, bytes per device, counts."""

    model: str
    architecture: str
    parameters: int
    dtype: str
    device: str
    device_count: int
    mesh: str
    max_model_len: int
    kv_dtype: str
    kv_tokens: int
    max_concurrency: int
    programs: int
    weight_bytes: int
    program_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class Built:
    """Everything the engine runs on."""

    info: EngineInfo
    tokenizer: Tokenizer | None
    program: Program
    scheduler: Scheduler
    defaults: dict[str, Any]


@dataclass(frozen=True)
class _Model:
    """A model before its weights: where it lives (None with random weights of a known shape), what it is, how long it may run."""

    folder: Path | None
    name: str
    graph: Graph
    dtype: np.dtype
    max_tokens: int
    architecture: str

    @property
    def parameters(self) -> int:
        """Numbers that the model learned."""
        return sum(prod(spec.shape) for spec in self.graph.specs)


def build(config: EngineConfig, progress: Progress) -> Built:
    """Do all of the above.

    Raises:
        ConfigError: settings that cannot work together or on this machine. CheckpointError, TokenizerError: a model that cannot be read.
    """
    try:
        return _build(config, progress)
    except NotImplementedError as error:  # kernels asked for by name that refuse
        raise ConfigError(f"--implementation {config.execution.implementation}: {error}") from error


def _build(config: EngineConfig, progress: Progress) -> Built:
    mesh = _mesh(config)
    use_compilation_cache(config.execution.compilation_cache)
    model = _describe(config)
    tokenizer = Tokenizer.load(model.folder) if model.folder is not None else None
    defaults = _sampling_defaults(model.folder)
    memory, program = _program(config, model, Placement(mesh, DEFAULT_RULES, config.execution.implementation))
    limits = _limits(config)
    pools = [PagePool(memory.pool.pages, memory.pool.page_size, _prefix_index(config, model)) for _ in range(limits.replicas)]
    scheduler = Scheduler(limits, pools, config.scheduler.policy)
    if config.model.load_format != "random" and model.folder is not None:
        read.verify(model.folder, model.graph)  # before anything is compiled
    with ThreadPoolExecutor(1) as reader:
        weights = reader.submit(_weights, config, model, mesh, progress)
        program.compile(progress)
        memory = check_programs(memory, program.bytes_beside, config.cache)
        program.load(weights.result())
    info = _info(config, model, program.config, memory)
    return Built(info=info, tokenizer=tokenizer, program=program, scheduler=scheduler, defaults=defaults)


def _prefix_index(config: EngineConfig, model: _Model) -> PrefixIndex | None:
    if config.cache.prefix_caching == "off":
        return None
    return PrefixIndex(_page_size(config), (model.name, str(model.dtype), config.cache.kv_dtype))


def _page_size(config: EngineConfig) -> int:
    """Tokens of a page: on accelerators a whole block of the attention kernels."""
    return config.cache.page_size or (32 if devices.platform() == "cpu" else 64)


def use_compilation_cache(mode: str) -> None:
    """Keep compiled programs in the user's cache folder, so that the next start need not compile them."""
    if mode == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _sampling_defaults(folder: Path | None) -> dict[str, Any]:
    """What the model's authors recommend in generation_config.json, checked as a request's own values would be."""
    path = None if folder is None else folder / "generation_config.json"
    if path is None or not path.is_file():
        return {}
    values = read.read_json(path)
    given = {name: values[name] for name in SAMPLING_DEFAULTS if values.get(name) is not None}
    try:
        SamplingParams(**given)
    except RequestError as error:
        raise ConfigError(f"{path.name} of {path.parent.name}: {error}") from None
    return given


def _mesh(config: EngineConfig) -> Mesh:
    shape = config.execution.mesh
    devices.prepare(shape.size)
    try:
        return make_mesh(shape._asdict(), devices.select(shape.size))
    except devices.DeviceError as error:
        raise ConfigError(f"--mesh data={shape.data},tensor={shape.tensor}: {error}") from None


def _describe(config: EngineConfig) -> _Model:
    if config.model.load_format == "random" and config.model.model in find.known_shapes():
        folder, values = None, find.find_shape(config.model.model)
    else:
        folder = hub.resolve(config.model.model, config.model.revision)
        values = read.read_config(folder)
    module = find.find(values.get("model_type"))
    dtype = _dtype(config.model.dtype)
    model_config = module.Config.from_hf(values)
    quantization = Quantization(config.model.quantize) if config.model.quantize else None
    graph = Graph.of(module, model_config, dtype, quantization)
    longest = model_config.max_positions
    if config.model.max_model_len is not None and config.model.max_model_len > longest:
        raise ConfigError(f"--max-model-len {config.model.max_model_len} exceeds the {longest} tokens the model was made for; lower it")
    name = config.model.model if folder is None or config.model.model == "demo" else Path(config.model.model).name
    return _Model(folder, name, graph, dtype, config.model.max_model_len or longest, str(values.get("model_type")))


def _dtype(name: str) -> np.dtype:
    chosen = {"auto": "float32" if devices.platform() == "cpu" else "bfloat16"}.get(name, name)
    return jax.numpy.dtype(chosen)


def _limits(config: EngineConfig) -> Limits:
    accelerator = devices.platform() != "cpu"
    sequences = config.scheduler.max_sequences or (256 if accelerator else 64)
    tokens = config.scheduler.max_step_tokens or (2048 if accelerator else 512)
    if config.execution.deterministic == "on":
        tokens = config.scheduler.max_step_tokens or sequences  # every step pays for all of them
    return Limits(sequences, tokens, _buckets(config, sequences, tokens)[-1].prefill_rows, config.execution.mesh.data)


def _buckets(config: EngineConfig, sequences: int, tokens: int) -> tuple[Bucket, ...]:
    return (fixed if config.execution.deterministic == "on" else buckets)(sequences, tokens)


def _program(config: EngineConfig, model: _Model, placement: Placement) -> tuple[MemoryPlan, Program]:
    limits = _limits(config)

    def planned(programs: int | None) -> tuple[MemoryPlan, Program]:
        memory = plan_memory(
            model.graph, PoolShape(2, _page_size(config), limits.replicas, CODES[config.cache.kv_dtype]),
            Demand(limits.sequences, model.max_tokens), config.cache, placement=placement,
            device_memory=devices.memory_bytes(placement.mesh.devices.flat[0]), programs=programs,
        )  # fmt: skip
        program = ProgramConfig(
            graph=model.graph, placement=placement, pool=memory.pool, buckets=_buckets(config, limits.sequences, limits.prefill_tokens),
            max_sequences=limits.sequences, max_tokens=model.max_tokens, threads=config.execution.compile_threads or os.cpu_count() or 1,
        )  # fmt: skip
        return memory, Program(program)

    memory, program = planned(None)
    return planned(program.measure() * 9 // 8) if memory.tight else (memory, program)  # compiled again they may need a little more


def _weights(config: EngineConfig, model: _Model, mesh: Mesh, progress: Progress) -> tuple[jax.Array, ...]:
    if config.model.load_format == "random" or model.folder is None:
        weights = random_weights(model.graph, seed=0, mesh=mesh, rules=DEFAULT_RULES)
    else:
        weights = read.load(model.folder, model.graph, mesh, DEFAULT_RULES, progress=lambda done, total: progress("read", done, total))
    return model.graph.leaves(weights)


def _info(config: EngineConfig, model: _Model, program: ProgramConfig, memory: MemoryPlan) -> EngineInfo:
    mesh = config.execution.mesh
    tokens = memory.pool.tokens
    return EngineInfo(
        model=model.name, architecture=model.architecture, parameters=model.parameters, dtype=str(model.dtype),
        device=devices.label(program.placement.mesh.devices.flat[0]), device_count=mesh.size, mesh=f"data={mesh.data},tensor={mesh.tensor}",
        max_model_len=model.max_tokens, kv_dtype=memory.pool.codes or str(model.dtype), kv_tokens=tokens,
        max_concurrency=min(program.max_sequences * mesh.data, tokens // model.max_tokens), programs=len(program.keys),
        weight_bytes=memory.weights, program_bytes=memory.programs, kv_bytes=memory.pages,
    )  # fmt: skip
