"""What one step computes, as pure functions: packed tokens through the model, then one drawn token for each row that samples.

`forward` embeds the step's tokens (a decode's token comes from its slot: the one sampled there last), runs every layer against the
paged cache and keeps the hidden state of each row's last token; `sample` turns those into tokens and updates the slots. Both run
inside one compiled program per bucket. This file does not know about compilation, buffers on the host or requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer import sampling
from jaxinfer.batch import LAST_SAMPLED
from jaxinfer.models.graph import Graph
from jaxinfer.models.layers import Placement, StepContext
from jaxinfer.sampling import Sampled
from jaxinfer.sharding import constrain
from jaxinfer.step import slots as slot_state
from jaxinfer.step.inputs import Shapes, StepInputs, unpack
from jaxinfer.step.slots import Slots
from pallas_kernels import PagedMetadata


@dataclass(frozen=True)
class Step:
    """Everything static about a step: the model's description, the bucket's shapes, where arrays live."""

    graph: Graph
    shapes: Shapes
    placement: Placement

    def __call__(self, leaves: tuple[Array, ...], kv: tuple[Array, ...], slots: Slots, buffer: Int[Array, "replicas words"]) -> Any:
        """(kv, slots, sampled) after one step. Donates `kv` and `slots`."""
        inputs = unpack(buffer, self.shapes)
        model: Any = self.graph.bind(leaves)
        hidden, kv = forward(model, kv, slots, inputs, self)
        logits = model.head(hidden, self.placement)
        slots, sampled = sample(logits, slots, inputs, spare_slot=self.shapes.spare_slot, placement=self.placement)
        return kv, slots, sampled


def forward(
    model: Any, kv: tuple[Array, ...], slots: Slots, inputs: StepInputs, step: Step
) -> tuple[Float[Array, "rows embed"], tuple[Array, ...]]:  # fmt: skip
    """Hidden state of each row's last token (empty rows: of some token), and the cache with the step's keys and values."""
    bucket, replicas = step.shapes.bucket, step.shapes.replicas
    metadata = PagedMetadata(
        page_tables=inputs.page_tables, query_starts=inputs.query_starts, query_lengths=inputs.query_lengths,
        kv_lengths=inputs.kv_lengths, decode_rows=bucket.decode_rows,
    )  # fmt: skip
    context = StepContext(positions=inputs.positions, metadata=metadata, placement=step.placement)
    result = model(_current_tokens(inputs, slots, step.shapes), kv, context)
    tokens = result.hidden.reshape(replicas, bucket.tokens, -1)  # by replica, so that none needs another's tokens
    last = (inputs.query_starts + jnp.maximum(inputs.query_lengths - 1, 0)).reshape(replicas, bucket.rows, 1)
    hidden = jnp.take_along_axis(tokens, last, axis=1).reshape(replicas * bucket.rows, -1)
    return hidden, result.kv


def sample(
    logits: Float[Array, "rows vocab"], slots: Slots, inputs: StepInputs, *, spare_slot: int, placement: Placement
) -> tuple[Slots, Sampled]:
    """Draw a token for each row; rows that do not sample leave their slot as it is.

    Slots are whole on every device, so each learns every row's token first: else XLA would add up the devices' tables of counts.
    """
    rows, positions = inputs.slots, inputs.kv_lengths
    settings = slot_state.settings(slots, rows, positions)
    penalise = jnp.any((settings.presence != 0) | (settings.frequency != 0) | (settings.repetition != 1))
    adjusted = jax.lax.cond(
        penalise, lambda: sampling.penalised(logits, slots.counts[rows], slots.in_prompt[rows], settings), lambda: logits
    )
    adjusted = jax.lax.cond(slot_state.has_rules(slots, rows), lambda: slot_state.ruled(adjusted, slots, rows, positions), lambda: adjusted)
    sampled = sampling.sample(logits, adjusted, settings)
    drawn = (jnp.where(inputs.samples == 1, rows, spare_slot), sampled.token)
    written, tokens = (constrain(values, (None,), placement.mesh, placement.rules) for values in drawn)
    return slot_state.record(slots, written, tokens), sampled


def _current_tokens(inputs: StepInputs, slots: Slots, shapes: Shapes) -> Int[Array, " tokens"]:
    """The step's token ids, with `LAST_SAMPLED` replaced by what the row's slot drew last."""
    rows = shapes.bucket.decode_rows
    if rows == 0:
        return inputs.tokens
    tokens = inputs.tokens.reshape(shapes.replicas, shapes.bucket.tokens)
    held = slots.last_token[inputs.slots.reshape(shapes.replicas, shapes.bucket.rows)[:, :rows]]
    decodes = jnp.where(tokens[:, :rows] == LAST_SAMPLED, held, tokens[:, :rows])
    return jnp.concatenate([decodes, tokens[:, rows:]], axis=1).reshape(-1)
