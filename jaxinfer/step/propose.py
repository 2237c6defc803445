"""What a draft model thinks comes next: a few small steps in one program, from pages that the forward passes have filled for it.

The draft model's keys and values lie in pages of the same numbers as the model's, in pools of its own, so whatever is shared, copied or
given back is so for both. Each of a decode row's drafts is drawn with the noise of its own (request, position), the same that the
model's draw will have: so the two agree often at any temperature. Nothing here decides about the output. This file does not know
who gets drafts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxinfer import sampling
from jaxinfer.models.graph import Graph
from jaxinfer.models.layers import Placement, StepContext
from jaxinfer.step import slots as slot_state
from jaxinfer.step.forward import current_tokens
from jaxinfer.step.inputs import PADDING_POSITION, Shapes, unpack
from jaxinfer.step.slots import Slots
from pallas_kernels import PagedMetadata, Pool


@dataclass(frozen=True)
class Propose:
    """Everything static: the draft model, a bucket whose decode rows have several tokens, the vocabulary that drafts are taken from.

    greedy: no row draws at a temperature.
    """

    graph: Graph
    shapes: Shapes
    placement: Placement
    vocab: int
    greedy: bool

    def __call__(
        self, leaves: tuple[Array, ...], kv: tuple[Pool, ...], slots: Slots, buffer: Int[Array, "replicas words"]
    ) -> tuple[tuple[Pool, ...], Int[Array, "rows drafts"]]:
        """(kv, drafts) for every decode row of a packed step. Donates `kv`, the draft model's pools."""
        inputs, width = unpack(buffer, self.shapes), self.shapes.bucket.decode_tokens
        model: Any = self.graph.bind(leaves)
        rows = self.shapes.bucket.decode_rows
        starts = inputs.kv_lengths - inputs.query_lengths
        token = current_tokens(inputs, slots, self.shapes).reshape(-1, width)[:, 0]
        first = jnp.tile(jnp.arange(rows, dtype=jnp.int32), self.shapes.replicas)
        drafts = []
        for number in range(width - 1):
            at = starts + number
            real = number < inputs.query_lengths
            metadata = PagedMetadata(inputs.page_tables, first, real.astype(jnp.int32), jnp.where(real, at + 1, 0), rows)
            context = StepContext(jnp.where(real, at, PADDING_POSITION), metadata, self.placement)
            result = model(token, kv, context)
            kv, logits = result.kv, model.head(result.hidden, self.placement)[:, : self.vocab]
            settings = replace(slot_state.settings(slots, inputs.slots, at + 1), logprobs=jnp.full_like(at, -1))
            token = sampling.likeliest(logits) if self.greedy else sampling.sample(logits, logits, settings).token
            drafts.append(token)
        return kv, jnp.stack(drafts, axis=1)
