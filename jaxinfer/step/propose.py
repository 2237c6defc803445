"""What a draft model or a head thinks comes next: a few small steps in one program, from pages that the forward passes have filled for it.

The draft model's keys and values lie in pages of the same numbers as the model's, in pools of its own, so whatever is shared, copied or
given back is so for both. Each of a decode row's drafts is drawn with the noise of its own (request, position), the same that the
model's draw will have: so the two agree often at any temperature. Nothing here decides about the output. This file does not know
who gets drafts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer import sampling
from jaxinfer.models.graph import Graph
from jaxinfer.models.layers import Placement, StepContext
from jaxinfer.step import slots as slot_state
from jaxinfer.step.forward import current_tokens, settled
from jaxinfer.step.head import HeadBeside, ModelBeside
from jaxinfer.step.inputs import PADDING_POSITION, Shapes, unpack
from jaxinfer.step.slots import Slots
from pallas_kernels import PagedMetadata, Pool, shared_counters


@dataclass(frozen=True)
class Propose:
    """Everything static: the draft model, a bucket whose decode rows have several tokens, the vocabulary that drafts are taken from.

    greedy: no row draws at a temperature. target: the model, if what proposes is a head of it.
    """

    graph: Graph
    shapes: Shapes
    placement: Placement
    vocab: int
    greedy: bool
    target: Graph | None = None

    def __call__(
        self, leaves: tuple[Array, ...], kv: tuple[Pool, ...], slots: Slots, buffer: Int[Array, "replicas words"]
    ) -> tuple[tuple[Pool, ...], Int[Array, "rows drafts"]]:
        """(kv, drafts) for every decode row of a packed step. Donates `kv`, the draft model's pools. leaves: a target's come first."""
        inputs, width = settled(unpack(buffer, self.shapes), slots, self.shapes), self.shapes.bucket.decode_tokens
        thinker, rows = self._thinker(leaves), self.shapes.bucket.decode_rows
        starts = inputs.kv_lengths - inputs.query_lengths
        token = current_tokens(inputs, slots, self.shapes).reshape(-1, width)[:, 0]
        first, vocabulary = jnp.tile(jnp.arange(rows, dtype=jnp.int32), self.shapes.replicas), Vocabulary.of(thinker.targets(), self.vocab)
        drafts, state, counted = [], None, shared_counters() if self.placement.mesh.size == 1 else None
        for number in range(width - 1):
            at = starts + number
            real = number < inputs.query_lengths
            lengths = real.astype(jnp.int32), jnp.where(real, at + 1, 0)
            metadata = PagedMetadata(inputs.page_tables, first, *lengths, rows, counters=counted)
            context = StepContext(jnp.where(real, at, PADDING_POSITION), metadata, self.placement)
            state = state if number else thinker.begin(kv, context)
            kv, logits, state = thinker.think(token, kv, state, context)
            if self.greedy:
                token = vocabulary.ids(sampling.likeliest(logits))
            else:
                settings, logits = slot_state.settings(slots, inputs.slots, at + 1), vocabulary.spread(logits)
                token = sampling.sample(logits, logits, replace(settings, logprobs=jnp.full_like(at, -1))).token
            drafts.append(token)
        return kv, jnp.stack(drafts, axis=1)

    def _thinker(self, leaves: tuple[Array, ...]) -> Any:
        if self.target is None:
            return ModelBeside(self.graph.bind(leaves), self.vocab)
        weights = len(self.target.arrays)
        return HeadBeside(self.graph.bind(leaves[weights:]), self.target.bind(leaves[:weights]))


@dataclass(frozen=True)
class Vocabulary:
    """The target's ids of a draft vocabulary, and where each of the target's stands in it; None where the two are one."""

    targets: Int[Array, " drafts"] | None
    places: Int[Array, " vocab"] | None

    @classmethod
    def of(cls, targets: Int[Array, " drafts"] | None, vocab: int) -> Vocabulary:
        """For a target of so many tokens."""
        if targets is None:
            return cls(None, None)
        size = targets.shape[0]
        return cls(targets, jnp.full((vocab,), size, jnp.int32).at[targets].set(jnp.arange(size, dtype=jnp.int32), mode="drop"))

    def ids(self, drafts: Int[Array, " rows"]) -> Int[Array, " rows"]:
        """The target's ids."""
        return drafts if self.targets is None else self.targets[drafts]

    def spread(self, logits: Float[Array, "rows drafts"]) -> Float[Array, "rows vocab"]:
        """Logits of the target's tokens, so that each meets the noise that it has in the target's draw; -inf where there is no draft."""
        if self.places is None:
            return logits
        wider = jnp.pad(logits, ((0, 0), (0, 1)), constant_values=-jnp.inf)
        return jnp.take(wider, self.places, axis=1)
