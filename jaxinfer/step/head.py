"""A head (`models/eagle.py`) beside its target: where features are kept, and how the head sees each token after that of the one before.

The features of every token lie in the pages of its sequence, in a pool of their own behind the head's keys and values, so whatever is
shared, copied, wiped or given back is so for them too, and the features of the token before a step's first one are there whatever came
between: a chunk of the prompt, a prefix that was cached, a draft that did not stand. A forward pass of the target fills the head's pages
from true features; what the head made of its own hidden states while it proposed is written over.

This file does not know what is drawn or who gets drafts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxinfer.models.layers import StepContext
from pallas_kernels import PagedMetadata, Pool
from pallas_kernels.paged_attention.packing import row_of_token


class Thought(NamedTuple):
    """What a model that proposes makes of one token of each row: its pools, logits, and what it wants to be told with the next token."""

    kv: tuple[Pool, ...]
    logits: Float[Array, "rows drafts"]
    state: Float[Array, "rows embed"] | None


@dataclass(frozen=True)
class HeadBeside:
    """A head and its target, both bound to their weights: lives inside a trace."""

    head: Any
    target: Any

    def follow(
        self, tokens: Int[Array, " tokens"], features: Float[Array, "tokens features"], kv: tuple[Pool, ...], context: StepContext
    ) -> tuple[Pool, ...]:
        """The head's pools after a step's packed tokens, whose features the target has just made. Donates `kv`."""
        own, kept = _parts(kv)
        fused = self.head.fuse(features, context.placement)
        before, kept = remembered(fused, kept, context)
        return self.head(self._vectors(tokens, context), before, own, context).kv, kept

    def begin(self, kv: tuple[Pool, ...], context: StepContext) -> Float[Array, "rows embed"]:
        """The features of the token before each row's first one; a row has one token in this step, or none."""
        return _on_each_replica(_held, (context.metadata, kv[1]), context, 1)[0]

    def think(self, tokens: Int[Array, " rows"], kv: tuple[Pool, ...], state: Float[Array, "rows embed"], context: StepContext) -> Thought:
        """One token of each row; state: of the token before, as `begin` or the last thought gave it. Donates `kv`."""
        own, kept = _parts(kv)
        hidden, own = self.head(self._vectors(tokens, context), state, own, context)
        return Thought((own, kept), self.head.head(hidden, context.placement), hidden)

    def targets(self) -> Int[Array, " drafts"] | None:
        """The target's ids of the tokens that the head's logits are for; None: the same."""
        return self.head.targets()

    def _vectors(self, tokens: Int[Array, " tokens"], context: StepContext) -> Float[Array, "tokens embed"]:
        return (self.head.embedding or self.target.embedding)(tokens, context.placement)


@dataclass(frozen=True)
class ModelBeside:
    """A draft model, which needs nothing of its target. vocab: tokens that it may draft, its first ones."""

    model: Any
    vocab: int

    def follow(self, tokens: Int[Array, " tokens"], features: Any, kv: tuple[Pool, ...], context: StepContext) -> tuple[Pool, ...]:
        """Its pools after a step's packed tokens. Donates `kv`."""
        return self.model(tokens, kv, context).kv

    def begin(self, kv: tuple[Pool, ...], context: StepContext) -> None:
        """Nothing to be told with the first token."""

    def think(self, tokens: Int[Array, " rows"], kv: tuple[Pool, ...], state: None, context: StepContext) -> Thought:
        """One token of each row. Donates `kv`."""
        result = self.model(tokens, kv, context)
        return Thought(result.kv, self.model.head(result.hidden, context.placement)[:, : self.vocab], state)

    def targets(self) -> None:
        """Its tokens are the target's."""


def remembered(
    features: Float[Array, "tokens embed"], kept: Float[Array, "pages page_size embed"], context: StepContext
) -> tuple[Float[Array, "tokens embed"], Float[Array, "pages page_size embed"]]:
    """(the features of the token before each packed token, the pool with the step's own). The first token of a text gets zeros."""
    return _on_each_replica(_remembered, (features, context.positions, context.metadata, kept), context, 2)


def _parts(kv: tuple[Any, ...]) -> tuple[Pool, Array]:
    """The pool of the head's layer, and that of features."""
    own, kept = kv
    return own, kept


def _remembered(features: Array, positions: Array, metadata: PagedMetadata, kept: Array) -> tuple[Array, Array]:
    tokens, page_size = features.shape[0], kept.shape[1]
    real = jnp.maximum(positions, 0)
    page = jnp.where(positions >= 0, metadata.page_tables[row_of_token(metadata, tokens), real // page_size], 0)
    kept = kept.at[page, real % page_size].set(features)
    (held,) = _held(metadata, kept)  # from the pool as it is now: the step has written behind what is read
    before = jnp.concatenate([jnp.zeros_like(features[:1]), features[:-1]])
    firsts = jnp.where(metadata.query_lengths > 0, metadata.query_starts, tokens)
    return before.at[firsts].set(held, mode="drop"), kept


def _held(metadata: PagedMetadata, kept: Array) -> tuple[Array]:
    first, page_size = metadata.kv_lengths - metadata.query_lengths, kept.shape[1]
    at, rows = jnp.maximum(first - 1, 0), jnp.arange(first.shape[0], dtype=jnp.int32)
    return (jnp.where(first[:, None] > 0, kept[metadata.page_tables[rows, at // page_size], at % page_size], 0),)


def _on_each_replica(work: Any, values: tuple[Any, ...], context: StepContext, results: int) -> Any:
    """Page ids and places of tokens count within a replica, so each works on its own."""
    mesh = context.placement.mesh
    if mesh.size == 1:
        return work(*values)
    by_replica = PartitionSpec("data")
    return jax.shard_map(work, mesh=mesh, in_specs=by_replica, out_specs=(by_replica,) * results, check_vma=False)(*values)
