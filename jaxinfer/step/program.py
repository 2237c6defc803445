"""The compiled programs and the arrays they run on: the only place that lowers, compiles and launches.

`Program` owns weights (a flat tuple), KV pool and slots. `compile` lowers one program for every bucket and compiles them in parallel;
afterwards nothing is traced or compiled any more: a batch that fits no bucket is an error. `run` launches a packed batch and hands
back device arrays without waiting for them. This file does not know about requests beyond what a batch says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxinfer.batch import Admission, Batch
from jaxinfer.cache import kv as kv_cache
from jaxinfer.cache.kv import PoolShape
from jaxinfer.models.graph import Graph
from jaxinfer.models.layers import Placement
from jaxinfer.sampling import Sampled
from jaxinfer.sharding import ArraySpec, struct
from jaxinfer.step import slots as slot_state
from jaxinfer.step.buckets import Bucket, choose, occupancy
from jaxinfer.step.forward import Step
from jaxinfer.step.inputs import Packed, Shapes
from jaxinfer.step.slots import Draws

ADMIT = "admit"


@dataclass(frozen=True)
class ProgramConfig:
    """What the programs are compiled for. `max_sequences` counts per replica; `max_tokens` bounds one sequence's length."""

    graph: Graph
    placement: Placement
    pool: PoolShape
    buckets: tuple[Bucket, ...]
    max_sequences: int
    max_tokens: int
    threads: int

    @property
    def kv_specs(self) -> tuple[ArraySpec, ...]:
        """The pool of every layer."""
        return self.graph.kv_specs(self.pool.all_pages, self.pool.page_size, implementation=self.placement.implementation)

    @property
    def vocab(self) -> int:
        """Token ids are below it."""
        return self.graph.config.vocab_size

    @property
    def spare_slot(self) -> int:
        """The slot that padding rows write to."""
        return self.max_sequences * self.pool.replicas

    def shapes(self, bucket: Bucket) -> Shapes:
        """The layout of a bucket's input buffer."""
        page_size = self.pool.page_size
        return Shapes(bucket, self.pool.replicas, -(-self.max_tokens // page_size), page_size, self.spare_slot)


class Program:
    """Compiled steps over the arrays they need. One thread uses it."""

    def __init__(self, config: ProgramConfig) -> None:
        self.config = config
        self.compile_seconds: dict[str, float] = {}
        self._compiled: dict[Any, Any] = {}
        self._leaves: tuple[Array, ...] = ()
        self._kv: tuple[Array, ...] = ()
        self._slots: Any = None
        self._replicated = NamedSharding(config.placement.mesh, PartitionSpec())
        self._by_replica = NamedSharding(config.placement.mesh, PartitionSpec("data", None))

    def compile(self, progress: Callable[[str, int, int], None]) -> None:
        """Lower every program here and compile them on `threads` threads; calls progress("compile", done, total) from any thread."""
        work: list[Any] = [*self.config.buckets, ADMIT]
        progress("compile", 0, len(work))
        with ThreadPoolExecutor(self.config.threads) as pool:
            futures = []
            for key in work:  # while one is lowered here, those before it compile there
                futures.append(pool.submit(self._compile, key, self.lower(key)))
                futures[-1].add_done_callback(lambda _: progress("compile", len(self._compiled), len(work)))
            for future in futures:
                future.result()

    def lower(self, key: Any) -> Any:
        """The lowered program of a bucket, or of `ADMIT`, from descriptions alone."""
        config = self.config
        slots = jax.tree.map(self._on_all, slot_state.describe(config.spare_slot + 1, config.vocab))
        if key == ADMIT:
            words = self._on_all(jax.ShapeDtypeStruct((slot_state.admission_words(config.max_tokens),), np.int32))
            return jax.jit(slot_state.admit, donate_argnums=0).lower(slots, words)
        shapes = config.shapes(key)
        mesh, rules = config.placement.mesh, config.placement.rules
        step = Step(config.graph, shapes, config.placement)
        leaves = config.graph.structs(mesh, rules)
        pool = tuple(struct(spec, mesh, rules) for spec in config.kv_specs)
        buffer = jax.ShapeDtypeStruct(shapes.buffer, np.int32, sharding=self._by_replica)
        out = (tuple(spec.sharding for spec in pool), self._replicated, self._replicated)
        return jax.jit(step, donate_argnums=(1, 2), out_shardings=out).lower(leaves, pool, slots, buffer)

    def load(self, leaves: Sequence[Array]) -> None:
        """Take the weights and make the KV pool and the slots."""
        config = self.config
        self._leaves = tuple(leaves)
        self._kv = kv_cache.allocate(config.kv_specs, config.placement.mesh, config.placement.rules)
        self._slots = jax.device_put(slot_state.neutral(config.spare_slot + 1, config.vocab), self._replicated)

    def bucket_for(self, batch: Batch) -> Shapes:
        """The layout that a batch is packed into."""
        return self.config.shapes(choose(self.config.buckets, occupancy(batch, self.config.pool.replicas)))

    def admit(self, admission: Admission, draws: Draws) -> None:
        """Write a sequence's settings into its slot."""
        words = slot_state.pack_admission(admission, draws, self.config.max_tokens)
        self._slots = self._compiled[ADMIT](self._slots, jax.device_put(words, self._replicated))

    def run(self, packed: Packed) -> Sampled:
        """Launch a step; its result is on its way and has to be fetched."""
        buffer = jax.device_put(packed.buffer, self._by_replica)
        self._kv, self._slots, sampled = self._compiled[packed.shapes.bucket](self._leaves, self._kv, self._slots, buffer)
        return sampled

    def _compile(self, key: Any, lowered: Any) -> None:
        begun = time.perf_counter()
        self._compiled[key] = lowered.compile()
        self.compile_seconds[str(key)] = time.perf_counter() - begun

    def _on_all(self, spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=self._replicated)
