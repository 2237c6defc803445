"""Drafts against what is drawn: every position of a row draws as it would without drafts, and a draft stands if it is that token.

The draw of a position depends on the request's seed and the position alone, so a row's output is token for token what plain decoding
gives, for any filter, penalty or mask (unlike rejection sampling, Leviathan et al. 2023, which only keeps the distribution). A position
counts if every draft before it stands; what counts is recorded in the row's slot before the next position draws, so penalties and
rules see it. How many drafts did not stand is left there for the next step. This file does not know where drafts come from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxinfer import sampling
from jaxinfer.models.layers import Placement
from jaxinfer.sampling import Sampled, pytree
from jaxinfer.sharding import constrain
from jaxinfer.step import slots as slot_state
from jaxinfer.step.forward import Demand, DraftRows, RowInputs, Sampler
from jaxinfer.step.slots import Slots


@pytree
@dataclass(frozen=True)
class Verified:
    """What each position of each row drew (row after row), and how many of a row's draws count: its first ones."""

    drawn: Sampled
    counts: Int[Array, " rows"]


@dataclass(frozen=True)
class Verifier:
    """Draws at every position of each row and finds how far the row's drafts stand; static things as in `Sampler`.

    forced: for benchmarks with random weights only, where no setting leads: a draft stands with this probability (a coin for each slot and
    position), whatever it is and whatever was drawn. What comes of it is no text.
    """

    spare_slot: int
    placement: Placement
    demand: Demand = Demand.FULL
    forced: float | None = None

    def __call__(
        self, logits: Float[Array, "drawn vocab"], rows: DraftRows, mask: UInt32[Array, "drawn words"], slots: Slots
    ) -> tuple[Slots, Verified]:
        """(slots, verified). mask: one bit per token for each position, see `sampling.masked`. Donates `slots`."""
        rows = jax.tree.map(self._on_all, rows)
        full = self.demand is Demand.FULL
        slots, verified = self._one_by_one(logits, rows, mask, slots) if full else self._at_once(logits, rows, slots)
        drew = jnp.where(rows.lengths > 0, rows.slots, self.spare_slot)
        return replace(slots, rejected=slots.rejected.at[drew].set(rows.lengths - verified.counts)), verified

    def _at_once(self, logits: Float[Array, "drawn vocab"], rows: DraftRows, slots: Slots) -> tuple[Slots, Verified]:
        """No draw depends on a token before it: all positions together."""
        count, width = rows.tokens.shape
        place = jnp.arange(width, dtype=jnp.int32)[None]
        settings = slot_state.settings(slots, jnp.repeat(rows.slots, width), (rows.positions[:, None] + place).reshape(-1))
        sampled = sampling.sample_plainly(logits, settings if self.demand is Demand.DRAWN else None)
        token, finite = (self._on_all(values).reshape(count, width) for values in (sampled.token, sampled.finite))
        stands = self._stands(token[:, :-1], rows.tokens[:, 1:], rows, place[:, :-1]) & finite[:, :-1]
        before = jnp.concatenate([jnp.ones((count, 1), jnp.int32), jnp.cumprod(stands.astype(jnp.int32), axis=1)], axis=1)
        kept = (before == 1) & (place < rows.lengths[:, None])
        for number in range(width):
            slots = slot_state.record(slots, jnp.where(kept[:, number], rows.slots, self.spare_slot), token[:, number])
        return slots, Verified(sampled, jnp.sum(kept, axis=1, dtype=jnp.int32))

    def _one_by_one(
        self, logits: Float[Array, "drawn vocab"], rows: DraftRows, mask: UInt32[Array, "drawn words"], slots: Slots
    ) -> tuple[Slots, Verified]:
        """Position after position, each with the slots as the one before left them."""
        count, width = rows.tokens.shape
        sampler = Sampler(self.spare_slot, self.placement, self.demand)
        following = jnp.concatenate([rows.tokens[:, 1:], jnp.full((count, 1), -1, jnp.int32)], axis=1)
        of_logits, of_mask = (jnp.swapaxes(values.reshape(count, width, -1), 0, 1) for values in (logits, mask))

        def draw(
            state: tuple[Slots, Bool[Array, " rows"]], at: tuple[Array, Array, Array, Array]
        ) -> tuple[tuple[Slots, Bool[Array, " rows"]], tuple[Sampled, Bool[Array, " rows"]]]:
            (slots, open_rows), (place, logits, mask, draft) = state, at
            inputs = RowInputs(rows.slots, rows.positions + place, open_rows.astype(jnp.int32))
            slots, sampled = sampler(logits, inputs, mask, slots)
            stands = self._stands(sampled.token[:, None], draft[:, None], rows, place[None, None])[:, 0]
            stands = stands & sampled.finite & sampled.possible & (place + 1 < rows.lengths)
            return (slots, open_rows & self._on_all(stands)), (sampled, open_rows)

        places = jnp.arange(width, dtype=jnp.int32)
        (slots, _), (sampled, kept) = jax.lax.scan(draw, (slots, rows.lengths > 0), (places, of_logits, of_mask, following.T))
        drawn = jax.tree.map(lambda values: jnp.swapaxes(values, 0, 1).reshape(count * width, *values.shape[2:]), sampled)
        return slots, Verified(drawn, jnp.sum(kept, axis=0, dtype=jnp.int32))

    def _stands(
        self, drawn: Int[Array, "rows drafts"], drafts: Int[Array, "rows drafts"], rows: DraftRows, place: Int[Array, "1 drafts"]
    ) -> Bool[Array, "rows drafts"]:
        if self.forced is None:
            return drawn == drafts
        coins = (rows.positions[:, None] + place).astype(jnp.uint32) * np.uint32(2654435761) + rows.slots[:, None].astype(jnp.uint32)
        keys = jax.vmap(jax.random.key)(coins.reshape(-1))
        return jax.vmap(jax.random.uniform)(keys).reshape(drawn.shape) < self.forced

    def _on_all(self, values: Array) -> Array:
        """Small values that every device learns: slots are whole on each."""
        return constrain(values, (None,) * values.ndim, self.placement.mesh, self.placement.rules)
