"""What one step computes, as pure functions: packed tokens through the model, then one drawn token for each row that samples.

`Forward` embeds the step's tokens (a decode's token comes from its slot: the one sampled there last), runs every layer against the paged
cache and makes logits of each row's last token; `Sampler` turns logits into tokens and updates the slots. They are two compiled programs,
so that a mask of allowed tokens can be made on the host while the forward pass runs, and a sampler serves every bucket with as many rows.
Where decode rows have drafts, logits are made of each of their tokens and `verify.py` draws. A draft model, if there is one, runs over
the same tokens, so that it has seen what the model has (`propose.py`); a head reads what the model made of them (`head.py`). This file does
not know about compilation, buffers on the host or requests.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from jaxinfer import sampling
from jaxinfer.batch import DRAFTED, LAST_SAMPLED
from jaxinfer.models.graph import Graph
from jaxinfer.models.layers import Placement, StepContext
from jaxinfer.request import SamplingParams
from jaxinfer.sampling import Sampled, pytree
from jaxinfer.sharding import constrain
from jaxinfer.step import slots as slot_state
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.head import HeadBeside, ModelBeside
from jaxinfer.step.inputs import PADDING_POSITION, Shapes, StepInputs, unpack
from jaxinfer.step.slots import Slots
from pallas_kernels import PagedMetadata, Pool, shared_counters


@pytree
@dataclass(frozen=True)
class RowInputs:
    """What the sampler needs to know of each row: its slot, the position of the token to be drawn, and whether to keep it (1 or 0)."""

    slots: Int[Array, " rows"]
    positions: Int[Array, " rows"]
    samples: Int[Array, " rows"]


@pytree
@dataclass(frozen=True)
class DraftRows:
    """What the verifier needs to know of each row: its slot, the position of the first token to be drawn, how many of its tokens are real
    (0: a row that draws nothing), and those: the last one that is certain, then drafts."""

    slots: Int[Array, " rows"]
    positions: Int[Array, " rows"]
    lengths: Int[Array, " rows"]
    tokens: Int[Array, "rows width"]


@pytree
@dataclass(frozen=True)
class Computed:
    """What a forward pass leaves for later programs: hidden states of all tokens, float32 logits of each row's last one (with drafts: of
    each token), its rows."""

    hidden: Float[Array, "tokens embed"]
    logits: Float[Array, "drawn vocab"]
    rows: RowInputs | DraftRows


@dataclass(frozen=True)
class Forward:
    """Everything static about a forward pass: the model's description, the bucket's shapes, where arrays live, the draft model's if any."""

    graph: Graph
    shapes: Shapes
    placement: Placement
    draft: Graph | None = None

    def __call__(
        self, leaves: tuple[Array, ...], kv: tuple[Pool, ...], slots: Slots, buffer: Int[Array, "replicas words"],
        drafts: Int[Array, "rows drafts"] | None = None,
    ) -> tuple[tuple[Pool, ...], Computed]:  # fmt: skip
        """(kv, computed) after the step's tokens went through the model. Donates `kv`. With a draft model its leaves and pools follow the
        model's; drafts: what it proposed for the decode rows."""
        bucket, replicas = self.shapes.bucket, self.shapes.replicas
        inputs = settled(unpack(buffer, self.shapes), slots, self.shapes)
        weights, layers = len(self.graph.arrays), len(self.graph.config.attention_shapes)
        leaves, others = (leaves, ()) if self.draft is None else (leaves[:weights], leaves[weights:])
        kv, seen = (kv, ()) if self.draft is None else (kv[:layers], kv[layers:])
        model: Any = self.graph.bind(leaves)
        metadata = PagedMetadata(
            page_tables=inputs.page_tables, query_starts=inputs.query_starts, query_lengths=inputs.query_lengths,
            kv_lengths=inputs.kv_lengths, decode_rows=bucket.decode_rows, decode_tokens=bucket.decode_tokens,
            counters=shared_counters() if self.placement.mesh.size == 1 else None,
        )  # fmt: skip
        tapped = () if self.draft is None else self.draft.tapped
        context = StepContext(positions=inputs.positions, metadata=metadata, placement=self.placement, tapped=tapped)
        current = current_tokens(inputs, slots, self.shapes, drafts)
        result = model(current, kv, context)
        pools = result.kv
        if self.draft is not None:
            small: Any = self.draft.bind(others)
            follow = HeadBeside(small, model).follow if tapped else ModelBeside(small, self.graph.config.vocab_size).follow
            pools += follow(current, result.features, seen, context)
        if bucket.decode_tokens > 1:
            return pools, Computed(result.hidden, model.head(result.hidden, self.placement), _draft_rows(inputs, current, bucket))
        tokens = result.hidden.reshape(replicas, bucket.tokens, -1)  # by replica, so that none needs another's tokens
        last = (inputs.query_starts + jnp.maximum(inputs.query_lengths - 1, 0)).reshape(replicas, bucket.rows, 1)
        of_rows = jnp.take_along_axis(tokens, last, axis=1).reshape(replicas * bucket.rows, -1)
        rows = RowInputs(inputs.slots, inputs.kv_lengths, inputs.samples)
        return pools, Computed(result.hidden, model.head(of_rows, self.placement), rows)


class Demand(IntEnum):
    """What the rows of a step ask of the sampler: the likeliest tokens, tokens drawn at a temperature, or anything.

    A sampler is compiled for each, because a device that has to choose at run time keeps the host waiting until it has chosen.
    """

    GREEDY = 0
    DRAWN = 1
    FULL = 2

    @classmethod
    def of(cls, params: SamplingParams) -> Demand:
        """The least that serves a request."""
        if params.top_k > 0 or any(getattr(params, name) != usual for name, usual in _USUAL):
            return cls.FULL
        return cls.GREEDY if params.greedy else cls.DRAWN


# the settings that want the full sampler when they are not as usual
_PLAIN = {"temperature", "seed", "top_k", "prompt_logprobs", "max_tokens", "stop", "n", "skip_special_tokens"}
_USUAL = tuple((field.name, getattr(SamplingParams(), field.name)) for field in fields(SamplingParams) if field.name not in _PLAIN)


@dataclass(frozen=True)
class Sampler:
    """Draws a token for each row; rows that do not sample leave their slot as it is (they write to the spare one)."""

    spare_slot: int
    placement: Placement
    demand: Demand = Demand.FULL

    def __call__(
        self, logits: Float[Array, "rows vocab"], rows: RowInputs, mask: UInt32[Array, "rows words"], slots: Slots
    ) -> tuple[Slots, Sampled]:
        """(slots, sampled). mask: one bit per token, see `sampling.masked`. Donates `slots`.

        Slots are whole on every device, so each learns every row's token first: else XLA would add up the devices' tables of counts.
        """
        settings = slot_state.settings(slots, rows.slots, rows.positions)
        if self.demand is Demand.FULL:
            sampled = sampling.sample(logits, self._adjusted(logits, rows, mask, slots, settings), settings)
        else:
            sampled = sampling.sample_plainly(logits, settings if self.demand is Demand.DRAWN else None)
        drawn = (jnp.where(rows.samples == 1, rows.slots, self.spare_slot), sampled.token)
        written, tokens = (constrain(values, (None,), self.placement.mesh, self.placement.rules) for values in drawn)
        return slot_state.record(slots, written, tokens), sampled

    def _adjusted(
        self, logits: Float[Array, "rows vocab"], rows: RowInputs, mask: UInt32[Array, "rows words"], slots: Slots,
        settings: sampling.RowSettings,
    ) -> Float[Array, "rows vocab"]:  # fmt: skip
        """Logits after penalties, rules and masks; each is skipped at run time when no row asks for it."""
        penalise = jnp.any((settings.presence != 0) | (settings.frequency != 0) | (settings.repetition != 1))
        logits = jax.lax.cond(
            penalise, lambda: sampling.penalised(logits, slots.counts[rows.slots], slots.in_prompt[rows.slots], settings), lambda: logits
        )
        ruled = jax.lax.cond(
            slot_state.has_rules(slots, rows.slots), lambda: slot_state.ruled(logits, slots, rows.slots, rows.positions), lambda: logits
        )
        return jax.lax.cond(jnp.any(mask != sampling.ALL_ALLOWED), lambda: sampling.masked(ruled, mask), lambda: ruled)


def settled(inputs: StepInputs, slots: Slots, shapes: Shapes) -> StepInputs:
    """The step with its unsettled rows where they truly begin: the host took it that all drafts of the step before stand."""
    if inputs.unsettled is None:
        return inputs
    bucket, replicas = shapes.bucket, shapes.replicas
    late = inputs.unsettled * slots.rejected[inputs.slots]
    of_rows = late.reshape(replicas, bucket.rows)[:, : bucket.decode_rows]  # prompts are never late
    of_tokens = jnp.pad(jnp.repeat(of_rows, bucket.decode_tokens, axis=1), ((0, 0), (0, bucket.prefill_tokens))).reshape(-1)
    positions = jnp.where(inputs.positions == PADDING_POSITION, PADDING_POSITION, inputs.positions - of_tokens)
    return replace(inputs, positions=positions, kv_lengths=inputs.kv_lengths - late)


def current_tokens(
    inputs: StepInputs, slots: Slots, shapes: Shapes, drafts: Int[Array, "rows drafts"] | None = None
) -> Int[Array, " tokens"]:
    """The step's token ids, with `LAST_SAMPLED` replaced by what the row's slot drew last (in decode rows, or anywhere without any) and
    `DRAFTED` by the row's own draft (0 if there are none)."""
    bucket, replicas = shapes.bucket, shapes.replicas
    if bucket.decode_tokens > 1:
        held = slots.last_token[inputs.slots][:, None]
        made = jnp.zeros((held.shape[0], bucket.decode_tokens - 1), jnp.int32) if drafts is None else drafts
        tokens = inputs.tokens.reshape(held.shape[0], bucket.decode_tokens)
        tokens = jnp.where(tokens == LAST_SAMPLED, held, tokens)
        return jnp.where(tokens == DRAFTED, jnp.concatenate([held, made], axis=1), tokens).reshape(-1)
    tokens = inputs.tokens.reshape(replicas, bucket.tokens)
    last = slots.last_token[inputs.slots.reshape(replicas, bucket.rows)]
    if bucket.decode_rows:
        held = last[:, : bucket.decode_rows]
    else:  # the only row that begins at the token, if any does: a row with LAST_SAMPLED has no other token
        starts = jnp.where(inputs.query_lengths > 0, inputs.query_starts, -1).reshape(replicas, 1, bucket.rows)
        begins = starts == jnp.arange(bucket.tokens, dtype=jnp.int32)[None, :, None]
        held = jnp.sum(jnp.where(begins, last[:, None], 0), axis=2)
    first = held.shape[1]
    decodes = jnp.where(tokens[:, :first] == LAST_SAMPLED, held, tokens[:, :first])
    return jnp.concatenate([decodes, tokens[:, first:]], axis=1).reshape(-1)


def _draft_rows(inputs: StepInputs, tokens: Int[Array, " tokens"], bucket: Bucket) -> DraftRows:
    positions = inputs.kv_lengths - inputs.query_lengths + 1
    return DraftRows(inputs.slots, positions, inputs.query_lengths * inputs.samples, tokens.reshape(-1, bucket.decode_tokens))
