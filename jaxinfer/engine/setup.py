"""From settings to a compiled, loaded program: the engine's start-up, in order.

Find the model, read its configuration, describe its weights, arrange the mesh, size the KV pool by arithmetic (a model that cannot
fit is refused before a weight is read) and, where memory is tight, by what the compiler says the largest programs need; compile every
program while the weights are read, or load it from a bundle, whose pool has its size already; then load the weights. Nothing here runs
again once the engine is ready. This file does not know about requests.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jaxinfer import devices
from jaxinfer.cache.pages import PagePool
from jaxinfer.cache.prefix import PrefixIndex
from jaxinfer.checkpoint import audit_record, hub, read
from jaxinfer.config import ConfigError, EngineConfig, SpeculationConfig, cache_dir
from jaxinfer.engine import speculation
from jaxinfer.engine.costs import FOLLOWED, PLAIN, Costs, Way
from jaxinfer.engine.metrics import EngineMetrics
from jaxinfer.engine.scheduler import Limits, Scheduler
from jaxinfer.engine.speculation import Bounds, Speculator
from jaxinfer.engine.timing import measure
from jaxinfer.models import find
from jaxinfer.models.graph import Graph, random_weights
from jaxinfer.models.layers import Placement
from jaxinfer.planner import sizing
from jaxinfer.planner.memory import GIB, MemoryPlan, check_programs
from jaxinfer.quant.qarray import QSpec
from jaxinfer.request import RequestError, SamplingParams
from jaxinfer.sharding import DEFAULT_RULES, make_mesh
from jaxinfer.step.bundle import Bundle, BundleMismatch, Loader, open_bundle
from jaxinfer.step.keys import ProgramConfig
from jaxinfer.step.program import Program
from jaxinfer.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]  # stage (read: bytes, compile or load: programs), done, total; from any thread

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
    """Everything the engine runs on. config: the settings as they are in the end: a bundle brings some."""

    config: EngineConfig
    info: EngineInfo
    tokenizer: Tokenizer | None
    program: Program
    scheduler: Scheduler
    defaults: dict[str, Any]
    costs: Costs


@dataclass(frozen=True)
class _Model:
    """A model before its weights: where it lives (None with random weights of a known shape), what it is, how long it may run, its draft
    model if it is to have one."""

    folder: Path | None
    name: str
    graph: Graph
    dtype: np.dtype
    max_tokens: int
    architecture: str
    draft: _Model | None = None

    @property
    def parameters(self) -> int:
        """Numbers that the model learned."""
        return sum(prod(spec.shape) for spec in self.graph.specs)


def build(config: EngineConfig, progress: Progress) -> Built:
    """Do all of the above.

    Raises:
        ConfigError: settings that cannot work together or on this machine. CheckpointError, TokenizerError: a model that cannot be read.
    """
    bundle = None if config.execution.bundle is None else open_bundle(Path(config.execution.bundle))
    try:
        return _build(config, progress, bundle)
    except NotImplementedError as error:  # kernels asked for by name that refuse
        raise ConfigError(f"--implementation {config.execution.implementation}: {error}") from error
    except BundleMismatch as error:
        if config.execution.bundle_mismatch == "refuse":
            raise
        logger.warning("%s", error)
    return build(_without_bundle(config, bundle), progress)


def _without_bundle(config: EngineConfig, bundle: Bundle | None) -> EngineConfig:
    """The settings to compile with in place of a bundle that does not match: its own, but for the pool, unless others were given."""
    adopted = config
    if bundle is not None:
        with suppress(BundleMismatch):
            adopted = bundle.adopt(config)
    cache = replace(adopted.cache, kv_tokens=config.cache.kv_tokens)
    return replace(adopted, cache=cache, execution=replace(adopted.execution, bundle=None))


def _build(config: EngineConfig, progress: Progress, bundle: Bundle | None) -> Built:
    if bundle is not None:
        bundle.check_machine()
        config = bundle.adopt(config)
    mesh = _mesh(config)
    use_compilation_cache(config.execution.compilation_cache)
    model = _with_draft(config, _describe(config))
    _require_audit(config, model)
    tokenizer = Tokenizer.load(model.folder) if model.folder is not None else None
    _check_tokenizers(model, tokenizer)
    defaults = _sampling_defaults(model.folder)
    sized = _sizing(config, model, Placement(mesh, DEFAULT_RULES, config.execution.implementation))
    memory, program = sized.sized() if bundle is None else _from_bundle(sized, bundle)
    scheduler = _scheduler(config, model, memory)
    for of in _models(model):
        if config.model.load_format != "random" and of.folder is not None:
            read.verify(of.folder, of.graph)  # before anything is compiled
    with ThreadPoolExecutor(1) as reader:
        weights = reader.submit(_weights, config, model, mesh, progress)
        memory, program = _compiled(sized, memory, program, progress) if bundle is None else _loaded(memory, program, progress)
        program.load(weights.result())
    if scheduler.pools[0].size != memory.pool.pages:
        scheduler = _scheduler(config, model, memory)
    info = _info(config, model, program.config, memory)
    costs = Costs() if config.speculation.speculate == "off" else measure(program, partial(_overlapping, config))
    return Built(config=config, info=info, tokenizer=tokenizer, program=program, scheduler=scheduler, defaults=defaults, costs=costs)


def _models(model: _Model) -> tuple[_Model, ...]:
    return (model,) if model.draft is None else (model, model.draft)


def _with_draft(config: EngineConfig, model: _Model) -> _Model:
    """The model with its draft model or head, if the settings mean one."""
    found = sizing.draft_of(config, weights=config.model.load_format != "random")
    return model if found is None else replace(model, draft=_beside(config, model, found.name))


def _beside(config: EngineConfig, model: _Model, name: str | None) -> _Model:
    """The draft model or head of that name; without one a head that is made up."""
    folder, values = (None, None) if name is None else _found(name, None, config.model.load_format)
    graph = sizing.beside(model.graph, values, folder, config, devices.platform())
    kind = "eagle3" if values is None else str(values.get("model_type"))
    return _Model(folder, "a made-up head" if name is None else Path(name).name, graph, graph.dtype, model.max_tokens, kind)


def _check_tokenizers(model: _Model, tokenizer: Tokenizer | None) -> None:
    """Refuse a draft model whose token ids mean something else: its drafts would never stand."""
    if model.draft is None or model.draft.folder is None or tokenizer is None or model.draft.graph.tapped:
        return
    ours, theirs = (json.loads(of.to_json())["model"].get("vocab") for of in (tokenizer, Tokenizer.load(model.draft.folder)))
    if ours != theirs:
        raise ConfigError(f"--draft-model {model.draft.name} has another tokenizer than {model.name}; name one of the same family")


def _scheduler(config: EngineConfig, model: _Model, memory: MemoryPlan) -> Scheduler:
    limits = _limits(config)
    pools = [PagePool(memory.pool.pages, memory.pool.page_size, _prefix_index(config, model)) for _ in range(limits.replicas)]
    return Scheduler(limits, pools, config.scheduler.policy)


def _prefix_index(config: EngineConfig, model: _Model) -> PrefixIndex | None:
    if config.cache.prefix_caching == "off":
        return None
    return PrefixIndex(_page_size(config), (model.name, str(model.dtype), config.cache.kv_dtype))


def _page_size(config: EngineConfig) -> int:
    return sizing.page_size(config, devices.platform())


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
    folder, values = _found(config.model.model, config.model.revision, config.model.load_format)
    found = sizing.described(values, config, devices.platform(), folder)
    name = config.model.model if folder is None or config.model.model == "demo" else Path(config.model.model).name
    return _Model(folder, name, found.graph, found.graph.dtype, found.max_tokens, str(values.get("model_type")))


def _found(name: str, revision: str | None, load_format: str) -> tuple[Path | None, Mapping[str, Any]]:
    """A model's folder and its config.json; random weights of a well-known shape need no folder."""
    if load_format == "random" and name in find.known_shapes():
        return None, find.find_shape(name)
    folder = hub.resolve(name, revision)
    return folder, read.read_config(folder)


def _require_audit(config: EngineConfig, model: _Model) -> None:
    """Refuse numbers that nobody has audited, if the user wants that."""
    if config.model.require_audit is not None:
        stored = any(isinstance(spec, QSpec) for spec in model.graph.specs)
        scheme = audit_record.name_of(config.model.quantize, config.cache.kv_dtype, stored=stored)
        audit_record.require(model.folder, scheme, config.model.require_audit, config.model.model)


def make_speculator(settings: SpeculationConfig, program: ProgramConfig, costs: Costs, metrics: EngineMetrics) -> Speculator | None:
    """What decides about drafts in an engine; None where speculation is off."""
    if settings.speculate == "off":
        return None
    head = program.draft is not None and bool(program.draft.tapped)
    found = speculation.proposers(settings.speculate, model=program.draft is not None, head=head)
    bounds = Bounds(settings.drafts, program.vocab, program.pool.replicas)
    return Speculator(found, bounds, costs, metrics, unseen=speculation.unseen(settings))


def _overlapping(config: EngineConfig, way: Way) -> bool:
    """Whether steps that are run so are launched while another runs."""
    behind = way in (PLAIN, FOLLOWED) or (way.width > 1 and way.hidden and speculation.unseen(config.speculation))
    return config.execution.overlap == "on" and behind


def _limits(config: EngineConfig) -> Limits:
    sequences, tokens = sizing.widths(config, devices.platform())
    rows = sizing.bucket_list(config, devices.platform())[-1].prefill_rows
    return Limits(sequences, tokens, rows, config.execution.mesh.data, speculation.unseen(config.speculation))


def _sizing(config: EngineConfig, model: _Model, placement: Placement) -> sizing.Sizing:
    machine = sizing.Machine(devices.platform(), devices.memory_bytes(placement.mesh.devices.flat[0]))
    draft = None if model.draft is None else model.draft.graph
    return sizing.Sizing(config, sizing.Described(model.graph, model.max_tokens, draft), placement, machine)


def _compiled(sized: sizing.Sizing, memory: MemoryPlan, program: Program, progress: Progress) -> tuple[MemoryPlan, Program]:
    """Compile everything; once more for a smaller pool if the programs need more than they were taken to need."""
    program.compile(progress)
    if replace(memory, programs=program.bytes_beside).total > memory.limit:
        logger.warning("programs need %.2f GiB, more than was left for them; the KV pool is made smaller", program.bytes_beside / GIB)
        memory, program = sized.resized(program.bytes_beside)
        program.compile(progress)
    return check_programs(memory, program.bytes_beside, sized.config.cache), program


def _from_bundle(sized: sizing.Sizing, bundle: Bundle) -> tuple[MemoryPlan, Program]:
    """The bundle's pool and programs, not loaded yet; refuses what does not match."""
    source = Loader(bundle, sized.placement.mesh)
    memory, program = sized.planned(bundle.needed, source)
    if memory.pool.pages < bundle.pages:
        bundle.refuse_pool((memory.pool.pages - 1) * memory.pool.page_size)
    bundle.check(program.config)
    return memory, program


def _loaded(memory: MemoryPlan, program: Program, progress: Progress) -> tuple[MemoryPlan, Program]:
    if isinstance(program.source, Loader):
        program.source.start()
    program.compile(progress)
    return memory, program


def _weights(config: EngineConfig, model: _Model, mesh: Mesh, progress: Progress) -> tuple[jax.Array, ...]:
    leaves: tuple[jax.Array, ...] = ()
    for of in _models(model):
        if config.model.load_format == "random" or of.folder is None:
            weights = random_weights(of.graph, seed=0, mesh=mesh, rules=DEFAULT_RULES)
        else:
            weights = read.load(of.folder, of.graph, mesh, DEFAULT_RULES, progress=lambda done, total: progress("read", done, total))
            if "d2t" in weights:
                check_draft_vocabulary(of.name, np.asarray(weights["d2t"]), model.graph.config.vocab_size)
        leaves += of.graph.leaves(weights)
    return leaves


def check_draft_vocabulary(name: str, offsets: Int[np.ndarray, " drafts"], vocab: int) -> None:
    """Refuse a head that would draft tokens which its target does not have.

    Raises:
        ConfigError: its d2t leads out of the vocabulary, or to one token twice.
    """
    targets = offsets + np.arange(len(offsets))
    if targets.min() < 0 or targets.max() >= vocab or len(np.unique(targets)) < len(targets):
        raise ConfigError(
            f"--draft-model {name}: d2t must lead from {len(targets)} draft tokens to as many of {vocab} tokens, found"
            f" {len(np.unique(targets))} from {targets.min()} to {targets.max()}; the file is damaged, or of another model"
        )


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
