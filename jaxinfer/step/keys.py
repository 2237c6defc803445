"""What programs there are for a configuration, and their names: THE one list of what is compiled.

A forward pass is named by its bucket. This file does not know what programs compute, or how they are compiled and launched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxinfer.batch import Batch
from jaxinfer.cache.kv import PoolShape
from jaxinfer.models.graph import Graph
from jaxinfer.models.layers import Placement
from jaxinfer.step.buckets import Bucket, choose, occupancy
from jaxinfer.step.forward import Demand
from jaxinfer.step.inputs import Shapes

ADMIT, COPY, WIPE, POOL = "admit", "copy-pages", "wipe-pages", "make-pool"


@dataclass(frozen=True)
class SamplerKey:
    """Names the sampler for so many rows (of all replicas) that ask for no more than `demand`; of several tokens each, the verifier."""

    rows: int
    demand: Demand = Demand.FULL
    width: int = 1

    def __str__(self) -> str:
        name = f"sample{self.rows}" if self.width == 1 else f"verify{self.rows}x{self.width}"
        return f"{name}-{self.demand.name.lower()}"

    @property
    def draws(self) -> int:
        """Rows of logits."""
        return self.rows * self.width


@dataclass(frozen=True)
class ProposeKey:
    """Names the program in which the draft model proposes for a bucket's decode rows."""

    bucket: Bucket
    greedy: bool

    def __str__(self) -> str:
        return f"propose-{self.bucket}-{'greedy' if self.greedy else 'drawn'}"


@dataclass(frozen=True)
class AloneKey:
    """Names the forward pass of a bucket that leaves the draft model out: what the cache holds for it falls behind."""

    bucket: Bucket

    def __str__(self) -> str:
        return f"{self.bucket}-alone"


@dataclass(frozen=True)
class ScoreKey:
    """Names the program that scores a bucket's prompts."""

    bucket: Bucket

    def __str__(self) -> str:
        return f"score-{self.bucket}"


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
    draft: Graph | None = None  # a draft model, or a head of the model
    forced: float | None = None  # see `Verifier`; benchmarks set it on an engine that is ready, and compile its verifiers again

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The model, and the draft model if there is one: leaves and pools follow in this order."""
        return (self.graph,) if self.draft is None else (self.graph, self.draft)

    @property
    def kv_specs(self) -> tuple[Any, ...]:
        """The pool of every layer: an ArraySpec for each of its arrays."""
        pool, implementation = self.pool, self.placement.implementation
        specs = (graph.kv_specs(pool.all_pages, pool.page_size, implementation=implementation, codes=pool.codes) for graph in self.graphs)
        return tuple(spec for of_graph in specs for spec in of_graph)

    @property
    def vocab(self) -> int:
        """Token ids are below it."""
        return self.graph.config.vocab_size

    @property
    def spare_slot(self) -> int:
        """The slot that padding rows write to."""
        return self.max_sequences * self.pool.replicas

    @property
    def samplers(self) -> tuple[SamplerKey, ...]:
        """One for each number of rows that a bucket has and each demand; with one fixed shape, one fixed arithmetic too."""
        demands = Demand if any(bucket.decode_rows for bucket in self.buckets) else (Demand.FULL,)
        sizes = sorted({(bucket.decode_tokens, bucket.rows * self.pool.replicas) for bucket in self.buckets})
        return tuple(SamplerKey(rows, demand, width) for width, rows in sizes for demand in demands)

    @property
    def proposers(self) -> tuple[ProposeKey, ...]:
        """Two for each bucket with drafts, if there is a draft model."""
        buckets = () if self.draft is None else tuple(bucket for bucket in self.buckets if bucket.decode_tokens > 1)
        return tuple(ProposeKey(bucket, greedy) for bucket in buckets for greedy in (True, False))

    @property
    def alone(self) -> tuple[AloneKey, ...]:
        """One for each bucket without drafts, if there is a draft model."""
        buckets = () if self.draft is None else self.buckets
        return tuple(AloneKey(bucket) for bucket in buckets if bucket.decode_tokens == 1)

    @property
    def scorers(self) -> tuple[ScoreKey, ...]:
        """One for each bucket that holds prompts."""
        return tuple(ScoreKey(bucket) for bucket in self.buckets if bucket.prefill_tokens)

    @property
    def keys(self) -> tuple[Any, ...]:
        """Everything that is compiled."""
        return (*self.buckets, *self.alone, *self.samplers, *self.proposers, *self.scorers, ADMIT, COPY, WIPE, POOL)

    @property
    def largest(self) -> tuple[Any, ...]:
        """The programs that set how much memory all need: the forward of most tokens, the widest of decodes alone, the samplers of most
        draws (one for drafts, one without), a scorer, and the widest proposer of a draft model."""
        most = max(self.buckets, key=lambda bucket: bucket.tokens)
        widest = max(self.buckets, key=lambda bucket: (-bucket.prefill_tokens, bucket.tokens))
        scorer = max(self.scorers, key=lambda key: key.bucket.tokens, default=None)
        proposer = max((key for key in self.proposers if not key.greedy), key=lambda key: key.bucket.tokens, default=None)
        samplers = {key.width > 1: key for key in sorted(self.samplers, key=lambda key: (key.demand, key.draws))}
        return (*dict.fromkeys((most, widest)), *samplers.values(), *(key for key in (proposer, scorer) if key is not None))

    def shapes(self, bucket: Bucket) -> Shapes:
        """The layout of a bucket's input buffer."""
        page_size = self.pool.page_size
        unsettled = self.draft is not None and bucket.decode_rows > 0
        return Shapes(bucket, self.pool.replicas, -(-self.max_tokens // page_size), page_size, self.spare_slot, unsettled)

    def bucket_for(self, batch: Batch) -> Shapes:
        """The layout that a batch is packed into."""
        laid = batch if any(bucket.decode_rows for bucket in self.buckets) else batch.folded()
        return self.shapes(choose(self.buckets, occupancy(laid, self.pool.replicas)))
