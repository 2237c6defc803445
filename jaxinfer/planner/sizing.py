"""From settings to sized programs: what `auto` and defaults mean on a platform, and how large the KV pool may be.

The engine at start-up and the planner use the same functions, so that a plan says what a start will do. Memory is arithmetic first
(memory.py); where that leaves little room, the programs that set the peak are compiled and the pool is sized by what they need. This file
does not know where devices come from: they may be described ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer.cache.kv import CODES, PoolShape
from jaxinfer.checkpoint import read
from jaxinfer.config import ConfigError, EngineConfig
from jaxinfer.models import eagle, find
from jaxinfer.models.graph import Graph, Quantization
from jaxinfer.models.layers import Placement
from jaxinfer.planner.memory import Account, Demand, MemoryPlan, account, plan_memory
from jaxinfer.step.buckets import Bucket, buckets, fixed, verifying
from jaxinfer.step.executable import Source
from jaxinfer.step.keys import ProgramConfig
from jaxinfer.step.program import Program

MARGIN = (9, 8)  # programs that are compiled again, for another pool, may need a little more


class Machine(NamedTuple):
    """What is planned for: the platform ("cpu", "gpu" or "tpu") and the bytes that a device gives to arrays."""

    platform: str
    memory: int


class Widths(NamedTuple):
    """Per data replica: sequences at once, prompt tokens in a step."""

    sequences: int
    tokens: int


@dataclass(frozen=True)
class Described:
    """A model before its weights: its graph, how many tokens a sequence may have, and the graph of a draft model or head if any."""

    graph: Graph
    max_tokens: int
    draft: Graph | None = None


class Draft(NamedTuple):
    """What drafts, by name or path; None: a head that is made up."""

    name: str | None


def with_margin(programs: int) -> int:
    """What is set aside for programs that were seen to need so many bytes."""
    return programs * MARGIN[0] // MARGIN[1]


def page_size(config: EngineConfig, platform: str) -> int:
    """Tokens of a page: on accelerators a whole block of the attention kernels."""
    return config.cache.page_size or (32 if platform == "cpu" else 64)


def dtype(name: str, platform: str) -> np.dtype:
    """The dtype that `--dtype` means on a platform."""
    return jax.numpy.dtype({"auto": "float32" if platform == "cpu" else "bfloat16"}.get(name, name))


def widths(config: EngineConfig, platform: str) -> Widths:
    """How much a step may hold. In deterministic mode every step pays for all of it, so it is small."""
    accelerator = platform != "cpu"
    sequences = config.scheduler.max_sequences or (256 if accelerator else 64)
    tokens = 2048 if accelerator else 512
    if config.execution.deterministic == "on":
        tokens = sequences
    return Widths(sequences, config.scheduler.max_step_tokens or tokens)


def bucket_list(config: EngineConfig, platform: str) -> tuple[Bucket, ...]:
    """The list of step shapes that are compiled, run and planned."""
    if config.execution.deterministic == "on":
        return fixed(*widths(config, platform))
    speculation, (sequences, tokens) = config.speculation, widths(config, platform)
    wide = () if speculation.speculate == "off" else verifying(sequences, speculation.drafts)
    return tuple(sorted((*buckets(sequences, tokens), *wide)))


def longest(values: Mapping[str, Any]) -> int:
    """Tokens of the longest sequence that a model was made for, as its own architecture reads its config.json.

    Raises:
        ConfigError: an architecture that is not there, or a config.json that it cannot read.
    """
    return find.find(values.get("model_type")).Config.from_hf(read.of_model(values)).max_positions


def described(values: Mapping[str, Any], config: EngineConfig, platform: str, folder: Path | None = None) -> Described:
    """A model from its config.json; from the headers of its files in `folder` too where the checkpoint is quantised.

    Raises:
        ConfigError: an architecture that is not there, or a context longer than the model was made for.
    """
    module = find.find(values.get("model_type"))
    plain = read.of_model(values)
    model_config = module.Config.from_hf(plain)
    if folder is None and len(plain) < len(values):
        raise ConfigError(
            "config.json is of a quantised checkpoint, whose files say how; plan for the folder that holds them, or for the unquantised"
            " model's config.json with --quantize"
        )
    graph = _quantised(config, folder, Graph.of(module, model_config, dtype(config.model.dtype, platform)))
    longest, wanted = model_config.max_positions, config.model.max_model_len
    if wanted is not None and wanted > longest:
        raise ConfigError(f"--max-model-len {wanted} exceeds the {longest} tokens the model was made for; lower it")
    return Described(graph, wanted or longest)


def draft_of(config: EngineConfig, *, weights: bool = True) -> Draft | None:
    """What drafts by the settings: the model or head that was named, or the embedded model's own; None without one.

    weights: whether there must be some; where shapes are enough, a head may be made up.

    Raises:
        ConfigError: drafts of a model are wanted and none is named.
    """
    speculation, way = config.speculation, config.speculation.speculate
    if way in ("off", "lookup"):
        return None
    name = speculation.draft_model or ("draft" if config.model.model == "demo" and way != "eagle" else None)
    if name is not None or (way == "eagle" and not weights):
        return Draft(name)
    if way == "auto":
        return None
    needed = "the model's EAGLE-3 head" if way == "eagle" else "a smaller model with the same tokenizer"
    raise ConfigError(f"--speculate {way} needs --draft-model: {needed}; or use --speculate lookup")


def beside(target: Graph, values: Mapping[str, Any] | None, folder: Path | None, config: EngineConfig, platform: str) -> Graph:
    """The draft model or head of this config.json (see `described`); None: the head that one would train for the target.

    Raises:
        ConfigError: it is of the other kind than `--speculate` says, or cannot stand beside the target; as `described` does.
    """
    way, head = config.speculation.speculate, values is None or eagle.is_head(values)
    name = config.speculation.draft_model
    if head and way == "draft":
        raise ConfigError(f"--draft-model {name} is an EAGLE-3 head, no model of its own; use --speculate eagle")
    if not head and way == "eagle":
        raise ConfigError(f"--draft-model {name} is a model of its own, no EAGLE-3 head; use --speculate draft")
    if values is not None and not head:
        model = replace(config.model, model=name or config.model.model, revision=None, quantize=None, max_model_len=None)
        return described(values, replace(config, model=model), platform, folder).graph
    if values is None:
        return Graph.of(eagle, eagle.Config.beside(target.config), target.dtype)
    stored = None if config.model.load_format == "random" else folder
    own = stored is not None and read.holds(stored, "embed_tokens.weight")
    graph = Graph.of(eagle, eagle.Config.from_hf(read.of_model(values), target.config, own_embedding=own), target.dtype)
    return graph if stored is None else read.as_stored(stored, graph)


def with_draft(model: Described, values: Mapping[str, Any] | None, folder: Path | None, config: EngineConfig, platform: str) -> Described:
    """The model with the draft model or head of this config.json beside it.

    Raises:
        ConfigError: as `beside` does.
    """
    return replace(model, draft=beside(model.graph, values, folder, config, platform))


def _quantised(config: EngineConfig, folder: Path | None, graph: Graph) -> Graph:
    """The model's description with its weights quantised as the checkpoint has them, or as was asked for."""
    stored = graph if folder is None else read.as_stored(folder, graph)
    if config.model.quantize is None:
        return stored
    if stored is not graph:
        raise ConfigError(f"--quantize {config.model.quantize}: the weights in {folder} are quantised already; leave --quantize out")
    return Graph.of(graph.module, graph.config, graph.dtype, Quantization.parse(config.model.quantize))


@dataclass(frozen=True)
class Sizing:
    """One model under one set of settings on one mesh."""

    config: EngineConfig
    model: Described
    placement: Placement
    machine: Machine

    @property
    def demand(self) -> Demand:
        """What the pool is for."""
        return Demand(widths(self.config, self.machine.platform).sequences, self.model.max_tokens)

    @property
    def empty_pool(self) -> PoolShape:
        """Page size and replicas of the pool that is to be sized."""
        size, codes = page_size(self.config, self.machine.platform), CODES[self.config.cache.kv_dtype]
        return PoolShape(pages=2, page_size=size, replicas=self.placement.mesh.shape["data"], codes=codes)

    def account(self) -> Account:
        """What memory is asked for."""
        return account(
            self.model.graph, self.empty_pool, self.demand, self.config.cache, placement=self.placement,
            device_memory=self.machine.memory, draft=self.model.draft,
        )  # fmt: skip

    def planned(self, programs: int | None = None, source: Source | None = None) -> tuple[MemoryPlan, Program]:
        """The pool beside programs of so many bytes (None: a guess), and the programs for it, not made yet; see `Program` for `source`.

        Raises:
            ConfigError: not even one sequence of full length fits.
        """
        memory = plan_memory(
            self.model.graph, self.empty_pool, self.demand, self.config.cache, placement=self.placement,
            device_memory=self.machine.memory, programs=programs, draft=self.model.draft,
        )  # fmt: skip
        return memory, self.program(memory.pool, source)

    def program(self, pool: PoolShape, source: Source | None = None) -> Program:
        """The programs for a pool."""
        config = ProgramConfig(
            graph=self.model.graph, placement=self.placement, pool=pool, buckets=bucket_list(self.config, self.machine.platform),
            max_sequences=self.demand.sequences, max_tokens=self.model.max_tokens,
            threads=self.config.execution.compile_threads or os.cpu_count() or 1, draft=self.model.draft,
        )  # fmt: skip
        return Program(config, source)

    def sized(self) -> tuple[MemoryPlan, Program]:
        """The pool and its programs; where the guess leaves little room, by what the compiler says the largest programs need.

        Raises:
            ConfigError: not even one sequence of full length fits.
        """
        memory, program = self.planned()
        return self.resized(program.measure()) if memory.unsure else (memory, program)

    def resized(self, programs: int, source: Source | None = None) -> tuple[MemoryPlan, Program]:
        """The pool beside programs that were seen to need so many bytes.

        Raises:
            ConfigError: not even one sequence of full length fits.
        """
        return self.planned(with_margin(programs), source)
