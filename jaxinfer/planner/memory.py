"""How much KV cache fits: arithmetic over described arrays, before anything is allocated.

Memory per device = weights + slots + what programs need beside them + KV pages. Weights and slots are known from shapes; what programs
need is a guess until the compiler has said it. The pool takes what is left of `memory_fraction`, up to what `max_sequences` sequences of
full length could ever use. Nothing is allocated here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import prod

import jax

from jaxinfer.cache.kv import PoolShape
from jaxinfer.config import CacheConfig, ConfigError
from jaxinfer.models.graph import Graph
from jaxinfer.models.layers import Placement
from jaxinfer.sharding import device_bytes
from jaxinfer.step.slots import describe

GIB = 1 << 30


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each device, and the pool that follows. wanted: pages (per replica) of any use. limit: bytes that may be taken."""

    device: int
    weights: int
    slots: int
    programs: int
    pages: int
    pool: PoolShape
    wanted: int
    limit: int

    @property
    def total(self) -> int:
        """Bytes that will be in use on each device."""
        return self.weights + self.slots + self.programs + self.pages

    @property
    def tight(self) -> bool:
        """Whether memory, not demand, sets the size of the pool."""
        return self.pool.pages - 1 < self.wanted

    @property
    def unsure(self) -> bool:
        """Whether programs that need twice what they are taken to need would not fit beside this pool."""
        return self.tight or self.limit - self.total < self.programs


@dataclass(frozen=True)
class Demand:
    """What the pool is for: sequences at once and tokens in one sequence (per data replica)."""

    sequences: int
    tokens: int


@dataclass(frozen=True)
class Account:
    """What a device's memory is asked for, before the pool has a size. Bytes per device; pages per replica.

    page: one page of all layers. row: pages of one sequence of full length. guess: what programs may need, before a compiler has said it.
    sequences: at once, of all replicas.
    """

    limit: int
    weights: int
    slots: int
    page: int
    row: int
    wanted: int
    guess: int
    sequences: int

    def pages(self, programs: int) -> int:
        """Pages that fit (the guard page not counted), no more than wanted; below 0 where not even the rest fits."""
        return min(self.wanted, (self.limit - self.weights - self.slots - programs) // self.page - 1)

    def room(self, programs: int, replicas: int) -> int:
        """Sequences of full length that a replica could hold if as many were wanted, each with a slot on every device."""
        slot = self.slots // max(1, self.sequences + 1)
        free = self.limit - self.weights - slot - programs - self.page
        return max(0, free // (self.row * self.page + replicas * slot))

    def lacking(self, programs: int, sequences: int = 1) -> int:
        """Bytes that are missing for so many sequences of full length; below 0 if some are left."""
        return self.weights + self.slots + programs + (self.row * sequences + 1) * self.page - self.limit


def account(
    graph: Graph, pool: PoolShape, demand: Demand, cache: CacheConfig, *, placement: Placement, device_memory: int,
    draft: Graph | None = None,
) -> Account:  # fmt: skip
    """Add up what is known from shapes; `pool` says the page size and the replicas, `draft` is a draft model. Allocates nothing."""
    mesh, rules, graphs = placement.mesh, placement.rules, (graph,) if draft is None else (graph, draft)
    vocab, sequences = graph.config.vocab_size, demand.sequences * pool.replicas
    one_page = [
        array for of in graphs for array in jax.tree.leaves(
            of.kv_specs(pool.replicas, pool.page_size, implementation=placement.implementation, codes=pool.codes)
        )
    ]  # fmt: skip
    row = -(-demand.tokens // pool.page_size)
    return Account(
        limit=int(device_memory * cache.memory_fraction),
        weights=sum(device_bytes(spec, mesh, rules) * count for of in graphs for spec, count in Counter(of.arrays).items()),
        slots=sum(prod(spec.shape) * spec.dtype.itemsize for spec in jax.tree.leaves(describe(sequences + 1, vocab))),
        page=sum(device_bytes(spec, mesh, rules) * count for spec, count in Counter(jax.tree.leaves(one_page)).items()),
        row=row,
        wanted=row * demand.sequences if cache.kv_tokens is None else cache.kv_tokens // pool.page_size,
        guess=device_memory // 32 + 4 * 4 * vocab * sequences,
        sequences=sequences,
    )


def plan_memory(
    graph: Graph,
    pool: PoolShape,
    demand: Demand,
    cache: CacheConfig,
    *,
    placement: Placement,
    device_memory: int,
    programs: int | None = None,
    draft: Graph | None = None,
) -> MemoryPlan:
    """Size the pool (the given one's `pages` are replaced); `device_memory` and `programs` are bytes per device (None: not known yet). A
    draft model has its own part of every page.

    Raises:
        ConfigError: not even one sequence of `demand.tokens` tokens fits, with what is there and what would help.
    """
    asked = account(graph, pool, demand, cache, placement=placement, device_memory=device_memory, draft=draft)
    needed = asked.guess if programs is None else programs
    pages = asked.pages(needed)
    if pages < asked.row:
        left = asked.limit - asked.weights - asked.slots - needed
        raise ConfigError(_too_small(cache, pool.page_size, pages=max(0, pages), row=asked.row, left=left))
    sized = replace(pool, pages=pages + 1)
    return MemoryPlan(device_memory, asked.weights, asked.slots, needed, sized.pages * asked.page, sized, asked.wanted, asked.limit)


def check_programs(plan: MemoryPlan, programs: int, cache: CacheConfig) -> MemoryPlan:
    """The plan with what the compiled programs really need.

    Raises:
        ConfigError: it is more than memory holds, with the flags that would help.
    """
    made = replace(plan, programs=programs)
    if made.total <= plan.limit:
        return made
    raise ConfigError(
        f"programs need {programs / GIB:.2f} GiB beside {plan.weights / GIB:.2f} GiB of weights and {plan.pages / GIB:.2f} GiB of KV cache,"
        f" more than --memory-fraction {cache.memory_fraction:g} of {plan.device / GIB:.1f} GiB;"
        " lower --max-step-tokens, --max-sequences or --kv-tokens"
    )


def _too_small(cache: CacheConfig, page_size: int, *, pages: int, row: int, left: int) -> str:
    fit, needed = pages * page_size, row * page_size
    if cache.kv_tokens is not None and cache.kv_tokens < needed:
        return f"--kv-tokens {cache.kv_tokens} holds {fit} tokens, but one sequence may have {needed}; raise it or lower --max-model-len"
    return (
        f"KV cache: {max(left, 0) / GIB:.2f} GiB left after weights and programs; {fit} tokens fit, but one sequence may have {needed};"
        f" use --max-model-len {max(page_size, fit)}, a larger mesh, a higher --memory-fraction, --quantize int8 or --kv-dtype int8"
    )
