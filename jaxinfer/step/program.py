"""The compiled programs and the arrays they run on: the only place that lowers, compiles and launches.

`Program` owns weights (a flat tuple), KV pool and slots. `compile` makes a forward program for every bucket, a sampler for every
number of rows and the small programs that edit slots and pages, in parallel, each from its source (executable.py: compiled here, or
loaded from a bundle); afterwards nothing is traced or compiled any more: a batch that fits no bucket is an error. `forward` and
`sample` launch the two halves of a step and hand back device arrays without waiting for them. This file does not
know about requests beyond what a batch says.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from jaxinfer import sampling
from jaxinfer.batch import Admission
from jaxinfer.sampling import Sampled
from jaxinfer.sharding import struct
from jaxinfer.step import gaps
from jaxinfer.step import slots as slot_state
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.executable import Call, Compiler, InPlace, InTurns, Made, Source, twin, usual
from jaxinfer.step.forward import Computed, Demand, DraftRows, Forward, RowInputs, Sampler
from jaxinfer.step.inputs import Packed, Shapes
from jaxinfer.step.keys import ADMIT, COPY, POOL, WIPE, AloneKey, ProgramConfig, ProposeKey, SamplerKey, ScoreKey
from jaxinfer.step.pages import AT_ONCE, PageEdit, blocks
from jaxinfer.step.propose import Propose
from jaxinfer.step.score import Score, Scored, pack_targets
from jaxinfer.step.sizes import Beside, ProgramSize, beside, kind
from jaxinfer.step.slots import Draws
from jaxinfer.step.verify import Verified, Verifier

PAIRED = ("gpu",)  # platforms where programs of steps run in turns with a second copy (see `InTurns`), and arrays have to lie still
Progress = Callable[[str, int, int], None]  # stage, done, total; from any thread


def options_for(platform: str) -> dict[str, str]:
    """XLA's options for a forward program with prompts. A command buffer is written anew before a GPU starts on it, as every such step
    brings other arrays; prompts keep a GPU busy for long enough that kernels are launched one by one meanwhile."""
    return {"xla_gpu_enable_command_buffer": ""} if platform == "gpu" else {}


def in_steps(key: Any) -> bool:
    """Whether a program's runs follow one another closely: a forward pass without prompts, a sampler, a proposer."""
    return kind(key) == "decode" or isinstance(key, SamplerKey | ProposeKey)


class Program:
    """Compiled steps over the arrays they need. One thread uses it."""

    def __init__(self, config: ProgramConfig, source: Source | None = None) -> None:
        self.config = config
        self.source = usual() if source is None else source
        self.compile_seconds: dict[str, float] = {}
        self._compiled: dict[Any, Any] = {}
        self._runs: dict[Any, Callable[..., Any]] = {}
        self._alone: dict[Bucket, Callable[..., Any]] = {}
        self._sizes: dict[Any, ProgramSize] = {}
        self._all_leaves: tuple[Array, ...] = ()
        self._bare: tuple[Array, ...] = ()  # without those of a draft model; cut off once, not in every step
        self._pool: tuple[Any, ...] = ()
        self._draft_pool: tuple[Any, ...] = ()
        self._computed: dict[Bucket, Computed] = {}
        self._slots: Any = None
        self._open_masks: dict[int, Array] = {}
        self._no_drafts: dict[Bucket, Array] = {}
        self._between: tuple[Array, ...] = ()  # what nobody reads: gaps lie between these
        self._layers = len(config.graph.config.attention_shapes)
        mesh = config.placement.mesh
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._by_replica = NamedSharding(mesh, PartitionSpec("data"))
        self._edit = PageEdit(config.kv_specs, mesh, config.placement.rules)

    def compile(self, progress: Progress, keys: Sequence[Any] | None = None) -> None:
        """Lower every program (or those of `keys`) here and compile them on `threads` threads, or have them loaded; calls
        progress("compile" or "load", done, total) from any thread."""
        work, stage = self.config.keys if keys is None else keys, self.source.stage
        progress(stage, 0, len(work))
        with ThreadPoolExecutor(self.config.threads) as pool:
            futures = []
            for key in work:  # while one is lowered here, those before it compile there
                futures.append(pool.submit(self._make, key, self.source.begin(key, self.call(key))))
                futures[-1].add_done_callback(lambda _: progress(stage, len(self._compiled), len(work)))
            for future in futures:
                future.result()
        if self._leaves:
            self._pair(work)

    def measure(self) -> int:
        """Compile the programs that set what memory programs need only: `bytes_beside` before the pool has its size."""
        self.compile(lambda *_: None, self.config.largest)
        return self.bytes_beside

    @property
    def sizes(self) -> dict[Any, ProgramSize]:
        """What each compiled program takes on a device, as the compiler says."""
        return dict(self._sizes)

    @property
    def leaves(self) -> tuple[Array, ...]:
        """The weights, in the graph's order; empty before `load`."""
        return self._bare

    @property
    def beside(self) -> Beside:
        """What the programs take on each device beside weights, pool and slots (see sizes.py)."""
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._held)) // self.config.pool.replicas
        return beside(self.sizes, self.config.keys, held + gaps.taken(self._gaps))

    @property
    def bytes_beside(self) -> int:
        """All of that."""
        return self.beside.total

    def compiled(self, key: Any) -> Any:
        """A compiled program."""
        return self._compiled[key]

    def call(self, key: Any) -> Call:
        """What the program of a bucket, a sampler, a scorer, `ADMIT`, `COPY`, `WIPE` or `POOL` computes, and of what."""
        if isinstance(key, Bucket):
            return self._forward_call(self.config.shapes(key))
        if isinstance(key, AloneKey):
            return self._forward_call(self.config.shapes(key.bucket), alone=True)
        if isinstance(key, SamplerKey):
            return self._sampler_call(key)
        if isinstance(key, ProposeKey):
            return self._proposer_call(key)
        if isinstance(key, ScoreKey):
            return self._score_call(self.config.shapes(key.bucket))
        if key == POOL:
            return Call(self._empty, (), (self._pool_shardings, self._by_replica))
        if key == ADMIT:
            words = jax.ShapeDtypeStruct((slot_state.admission_words(self.config.max_tokens),), np.int32)
            return Call(slot_state.admit, (self._slot_structs, self._on_all(words)), self._replicated, donated=(0,))
        ids = jax.ShapeDtypeStruct((self.config.pool.replicas, AT_ONCE), np.int32, sharding=self._by_replica)
        edit, columns = {COPY: (self._edit.copy, 2), WIPE: (self._edit.wipe, 1)}[key]
        return Call(edit, (self._pool_structs, *(ids,) * columns), self._pool_shardings, donated=(0,))

    def load(self, leaves: Sequence[Array]) -> None:
        """Take the weights and make the KV pool and the slots."""
        config = self.config
        self._leaves = tuple(leaves)
        self._pair(list(self._compiled))
        self._kv, held = self._compiled[POOL]()
        self._computed = dict(zip(self._held_buckets, held, strict=True))
        self._slots = jax.device_put(slot_state.neutral(config.spare_slot + 1, config.vocab), self._replicated)
        words = sampling.mask_words(config.vocab)
        for draws in {key.draws for key in config.samplers}:
            self._open_masks[draws] = jax.device_put(np.full((draws, words), sampling.ALL_ALLOWED), self._by_replica)
        for bucket in {key.bucket for key in config.proposers}:
            size = (config.pool.replicas * bucket.decode_rows, bucket.decode_tokens - 1)
            self._no_drafts[bucket] = jax.device_put(np.zeros(size, np.int32), self._by_replica)
        self._between = gaps.make(self._gaps, lambda size: jax.device_put(np.zeros(size, np.uint8), self._replicated))

    @property
    def _leaves(self) -> tuple[Array, ...]:
        """All weights, those of a draft model behind the others."""
        return self._all_leaves

    @_leaves.setter
    def _leaves(self, leaves: tuple[Array, ...]) -> None:
        self._all_leaves, self._bare = leaves, leaves[: len(self.config.graph.arrays)]

    @property
    def _kv(self) -> tuple[Any, ...]:
        """The pools of all layers, those of a draft model behind the others."""
        return self._pool + self._draft_pool

    @_kv.setter
    def _kv(self, pools: tuple[Any, ...]) -> None:
        self._pool, self._draft_pool = pools[: self._layers], pools[self._layers :]

    def admit(self, admission: Admission, draws: Draws) -> None:
        """Write a sequence's settings into its slot."""
        words = slot_state.pack_admission(admission, draws, self.config.max_tokens)
        self._slots = self._runs[ADMIT](self._slots, self._send(words, self._replicated))

    def forward(self, packed: Packed, drafting: Demand | None = None, *, alone: bool = False) -> Computed:
        """Launch the forward pass of a step. drafting: the draft model thinks of `DRAFTED` tokens first, for rows that ask so much of a
        sampler. alone: a step without drafts leaves the draft model out, if there is one."""
        bucket, buffer = packed.shapes.bucket, self._send(packed.buffer, self._by_replica)
        if alone and self.config.draft is not None:
            self._pool, computed = self._alone[bucket](self._bare, self._pool, self._slots, buffer, *self._place(bucket))
            return self._keep(bucket, computed)
        extra = (self._no_drafts[bucket],) if bucket in self._no_drafts else ()
        if drafting is not None:
            buffer = jax.device_put(buffer, self._by_replica)  # once for two programs
            extra = (self._propose(bucket, buffer, drafting),)
        self._kv, computed = self._runs[bucket](self._leaves, self._kv, self._slots, buffer, *extra, *self._place(bucket))
        return self._keep(bucket, computed)

    def _place(self, bucket: Bucket) -> tuple[Computed, ...]:
        """Where the results of a step without prompts go: over those of the one before, which has drawn its tokens by then."""
        return (self._computed.pop(bucket),) if bucket in self._computed else ()

    def _keep(self, bucket: Bucket, computed: Computed) -> Computed:
        if not bucket.prefill_tokens:
            self._computed[bucket] = computed
        return computed

    def _propose(self, bucket: Bucket, buffer: Array, demand: Demand) -> Array:
        config = self.config
        leaves = self._leaves if config.draft is not None and config.draft.tapped else self._leaves[len(config.graph.arrays) :]
        program = self._runs[ProposeKey(bucket, demand is Demand.GREEDY)]
        self._draft_pool, drafts = program(leaves, self._draft_pool, self._slots, buffer)
        return drafts

    def sample(self, computed: Computed, demand: Demand = Demand.FULL, mask: UInt32[np.ndarray, "rows words"] | None = None) -> Sampled:
        """Launch the sampler on what a forward pass computed; the result is on its way to the host. mask: see `sampling.masked`.

        In deterministic mode there is the full sampler only, whatever the demand.
        """
        rows = computed.logits.shape[0]
        allowed = self._open_masks[rows] if mask is None else self._send(mask, self._by_replica)
        sampler = self._runs.get(SamplerKey(rows, demand)) or self._runs[SamplerKey(rows)]
        self._slots, sampled = sampler(computed.logits, computed.rows, allowed, self._slots)
        sampled.told.copy_to_host_async()
        return sampled

    def verify(self, computed: Computed, demand: Demand = Demand.FULL, mask: UInt32[np.ndarray, "rows words"] | None = None) -> Verified:
        """Launch the verifier on what a forward pass with drafts computed; like `sample`, with a row of the mask for each position."""
        draws = computed.logits.shape[0]
        rows, width = computed.rows.tokens.shape if isinstance(computed.rows, DraftRows) else (draws, 1)
        allowed = self._open_masks[draws] if mask is None else self._send(mask, self._by_replica)
        self._slots, verified = self._runs[SamplerKey(rows, demand, width)](computed.logits, computed.rows, allowed, self._slots)
        for result in (verified.drawn.told, verified.counts):
            result.copy_to_host_async()
        return verified

    def score(self, packed: Packed, computed: Computed) -> Scored | None:
        """Launch the scoring of the prompts that ask for it; None if there are none."""
        targets = pack_targets(packed)
        if targets is None:
            return None
        program = self._runs[ScoreKey(packed.shapes.bucket)]
        return program(self.leaves, computed.hidden, self._send(targets, self._by_replica))

    def copy_pages(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy pages before the next step: (replica, source, target) each."""
        for sources, targets in blocks(copies, self.config.pool.replicas, 2):
            self._kv = self._runs[COPY](self._kv, self._send(sources, self._by_replica), self._send(targets, self._by_replica))

    def wipe_pages(self, pages: Sequence[tuple[int, int]]) -> None:
        """Fill pages with zeros before the next step: (replica, page) each."""
        for (ids,) in blocks(pages, self.config.pool.replicas, 1):
            self._kv = self._runs[WIPE](self._kv, self._send(ids, self._by_replica))

    def _forward_call(self, shapes: Shapes, *, alone: bool = False) -> Call:
        config = self.config
        graphs = (config.graph,) if alone else config.graphs
        pools = len(config.graph.config.attention_shapes) if alone else len(self._pool_structs)
        leaves = tuple(leaf for graph in graphs for leaf in graph.structs(config.placement.mesh, config.placement.rules))
        buffer = jax.ShapeDtypeStruct(shapes.buffer, np.int32, sharding=self._by_replica)
        out = (self._pool_shardings[:pools], self._by_replica)
        step = Forward(config.graph, shapes, config.placement, None if alone else config.draft)
        size = (shapes.replicas * shapes.bucket.decode_rows, shapes.bucket.decode_tokens - 1)
        drafts = (jax.ShapeDtypeStruct(size, np.int32, sharding=self._by_replica),) if config.draft is not None and size[1] else ()
        arguments = (leaves, self._pool_structs[:pools], self._slot_structs, buffer, *drafts)
        if not shapes.bucket.prefill_tokens:
            arguments = (*arguments, self._computed_struct(shapes.bucket))
            return Call(InPlace(step), arguments, out, donated=(1, len(arguments) - 1), keep_unused=True)
        return Call(step, arguments, out, donated=(1,), options=options_for(config.placement.mesh.devices.flat[0].platform))

    def _proposer_call(self, key: ProposeKey) -> Call:
        config, draft, shapes = self.config, self.config.graphs[-1], self.config.shapes(key.bucket)
        target = config.graph if draft.tapped else None
        graphs = config.graphs if draft.tapped else (draft,)
        leaves = tuple(leaf for graph in graphs for leaf in graph.structs(config.placement.mesh, config.placement.rules))
        pools = self._pool_structs[len(config.graph.config.attention_shapes) :]
        buffer = jax.ShapeDtypeStruct(shapes.buffer, np.int32, sharding=self._by_replica)
        step = Propose(draft, shapes, config.placement, config.vocab, key.greedy, target)
        out = (self._pool_shardings[len(config.graph.config.attention_shapes) :], self._by_replica)
        return Call(step, (leaves, pools, self._slot_structs, buffer), out, donated=(1,))

    def _sampler_call(self, key: SamplerKey) -> Call:
        config = self.config
        logits, of_rows = self._drawn_from(key.rows, key.width)
        mask = jax.ShapeDtypeStruct((key.draws, sampling.mask_words(config.vocab)), np.uint32, sharding=self._by_replica)
        step: Any = Sampler(config.spare_slot, config.placement, key.demand)
        if key.width > 1:
            step = Verifier(config.spare_slot, config.placement, key.demand, config.forced)
        return Call(step, (logits, of_rows, mask, self._slot_structs), (self._replicated, self._replicated), donated=(3,))

    def _drawn_from(self, rows: int, width: int) -> tuple[Any, Any]:
        """Descriptions of logits and of their rows."""
        shape = partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=self._by_replica)
        logits = jax.ShapeDtypeStruct((rows * width, self.config.vocab), jnp.float32, sharding=self._by_replica)
        if width == 1:
            return logits, sampling.unchecked(RowInputs, dict.fromkeys(("slots", "positions", "samples"), shape((rows,))))
        of_row = dict.fromkeys(("slots", "positions", "lengths"), shape((rows,)))
        return logits, sampling.unchecked(DraftRows, of_row | {"tokens": shape((rows, width))})

    def _computed_struct(self, bucket: Bucket) -> Any:
        """What a step without prompts makes."""
        graph, replicas = self.config.graph, self.config.pool.replicas
        logits, rows = self._drawn_from(bucket.rows * replicas, bucket.decode_tokens)
        hidden = jax.ShapeDtypeStruct((bucket.tokens * replicas, graph.config.hidden_size), graph.dtype, sharding=self._by_replica)
        return sampling.unchecked(Computed, {"hidden": hidden, "logits": logits, "rows": rows})

    def _score_call(self, shapes: Shapes) -> Call:
        config, shape, bucket = self.config, jax.ShapeDtypeStruct, shapes.bucket
        leaves = config.graph.structs(config.placement.mesh, config.placement.rules)
        size = (shapes.replicas * bucket.tokens, config.graph.config.hidden_size)
        hidden = shape(size, config.graph.dtype, sharding=self._by_replica)
        targets = shape((shapes.replicas, bucket.prefill_tokens), np.int32, sharding=self._by_replica)
        step = Score(config.graph, shapes, config.placement)
        return Call(step, (leaves, hidden, targets), self._replicated)

    def _send(self, values: np.ndarray, sharding: NamedSharding) -> Array | np.ndarray:
        """A copy of host memory for the devices: what the host does to its own afterwards does not matter. To a single device jax sends it
        with the call, which is sooner."""
        return values.copy() if sharding.mesh.size == 1 else jax.device_put(values.copy(), sharding)

    def _empty(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """A pool, and room for what steps without prompts compute."""
        return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), (self._pool_structs, self._held))

    @property
    def _held_buckets(self) -> tuple[Bucket, ...]:
        return tuple(bucket for bucket in self.config.buckets if not bucket.prefill_tokens)

    @property
    def _held(self) -> tuple[Any, ...]:
        return tuple(map(self._computed_struct, self._held_buckets))

    @property
    def _paired(self) -> bool:
        return self.config.placement.mesh.devices.flat[0].platform in PAIRED

    @property
    def _gaps(self) -> Counter[int]:
        return gaps.wanted(self.config) if self._paired else Counter()

    def _pair(self, keys: Sequence[Any]) -> None:
        """Have the programs that a GPU runs step by step run in turns with a second copy of each."""
        mesh, steps = self.config.placement.mesh, [key for key in keys if self._paired and in_steps(key)]
        with ThreadPoolExecutor(self.config.threads) as pool:
            copies = pool.map(lambda key: twin(self._compiled[key], self.call(key), mesh), steps)
            pairs = {key: InTurns(self._compiled[key], copy) for key, copy in zip(steps, copies, strict=True)}
        self._runs.update({key: pairs.get(key, self._compiled[key]) for key in keys})
        self._alone = {key.bucket: run for key, run in self._runs.items() if isinstance(key, AloneKey)}  # found sooner than by their keys

    def _make(self, key: Any, make: Callable[[], Made]) -> None:
        begun = time.perf_counter()
        self._compiled[key], self._sizes[key] = make()
        if isinstance(self.source, Compiler):
            self.compile_seconds[str(key)] = time.perf_counter() - begun

    @property
    def _pool_structs(self) -> tuple[Any, ...]:
        placement = self.config.placement
        return jax.tree.map(lambda spec: struct(spec, placement.mesh, placement.rules), self.config.kv_specs)

    @property
    def _pool_shardings(self) -> tuple[Any, ...]:
        return jax.tree.map(lambda spec: spec.sharding, self._pool_structs)

    @property
    def _slot_structs(self) -> Any:
        return jax.tree.map(self._on_all, slot_state.describe(self.config.spare_slot + 1, self.config.vocab))

    def _on_all(self, spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=self._replicated)
