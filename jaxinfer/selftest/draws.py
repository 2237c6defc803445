"""Verified draws beside plain ones: one random context, many seeds, two samples of tokens that must come from one distribution.

A context is a request with every filter, penalty and rule, some output, a mask, and logits for two positions, all drawn from a seed. Its
draft is the token that the plain sampler gives most often. This file does not know how many contexts are tried.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import sampling
from jaxinfer.batch import Admission
from jaxinfer.models.layers import Placement
from jaxinfer.request import Request, SamplingParams
from jaxinfer.sharding import make_mesh
from jaxinfer.step import slots as state
from jaxinfer.step.forward import DraftRows, RowInputs, Sampler
from jaxinfer.step.slots import INTEGERS, Draws, Slots
from jaxinfer.step.verify import Verifier

VOCAB, ROWS, LONGEST = 48, 1024, 32
RARE = 10  # tokens that were drawn less often in both samples together are counted as one


@dataclass(frozen=True)
class Context:
    """logits, masks: of both positions. position: that of the first token to be drawn."""

    slots: Slots
    logits: np.ndarray
    masks: np.ndarray
    position: int

    @classmethod
    def drawn(cls, seed: int) -> Context:
        """Any context."""
        draw, numbers = random.Random(seed), np.random.default_rng(seed)
        prompt, output = (tuple(draw.randrange(VOCAB) for _ in range(draw.randint(1, 8))) for _ in range(2))
        params = SamplingParams(
            temperature=draw.choice((0.6, 1.0, 1.6)), top_k=draw.choice((0, 12, 30)), top_p=draw.choice((0.8, 0.95, 1.0)),
            min_p=draw.choice((0.0, 0.01, 0.05)), presence_penalty=draw.uniform(-0.3, 0.6), frequency_penalty=draw.uniform(-0.2, 0.5),
            repetition_penalty=draw.uniform(0.8, 1.4), logit_bias={draw.randrange(VOCAB): draw.uniform(-2, 2) for _ in range(4)},
            min_tokens=len(output) + draw.choice((0, 1, 3)), allowed_token_ids=tuple(draw.sample(range(VOCAB), VOCAB - 6)),
        )  # fmt: skip
        banned = [(draw.randrange(VOCAB),), (output[-1], draw.randrange(VOCAB))]
        admission = Admission(Request("context", prompt, params), 0, output)
        words = state.pack_admission(admission, Draws(0, [draw.randrange(VOCAB)], banned), LONGEST)
        one = jax.jit(state.admit)(state.neutral(1, VOCAB), words)
        slots = jax.tree.map(lambda values: jnp.repeat(values, ROWS + 1, axis=0), one)
        masks = numbers.integers(0, 1 << 32, (2, sampling.mask_words(VOCAB)), np.uint32) | np.uint32(0x77777777)
        return cls(slots, numbers.normal(0, 1.5, (2, VOCAB)).astype(np.float32), masks, len(prompt) + len(output))

    def seeded(self, numbers: np.random.Generator) -> Slots:
        """The slots, each with a seed of its own."""
        integers = np.array(self.slots.integers)
        for name in ("seed_low", "seed_high"):
            integers[:, INTEGERS.index(name)] = numbers.integers(-(1 << 31), 1 << 31, ROWS + 1)
        return replace(self.slots, integers=jnp.asarray(integers))


def compare(seed: int, draws: int) -> list[float]:
    """The p-values of one context: the draft's place, and the place behind the draft where it stands."""
    context, numbers = Context.drawn(seed), np.random.default_rng(seed + 1)
    plain = np.concatenate([_plain(context, numbers) for _ in range(-(-draws // ROWS))])[:draws]
    draft = int(np.bincount(plain[:, 0]).argmax())
    verified = np.concatenate([_verified(context, numbers, draft) for _ in range(-(-draws // ROWS))])[:draws]
    if np.any((verified[:, 0] == draft) != (verified[:, 1] >= 0)):
        return [0.0]
    return [
        homogeneity(plain[:, 0], verified[:, 0]),
        homogeneity(plain[plain[:, 0] == draft, 1], verified[verified[:, 1] >= 0, 1]),
    ]


def homogeneity(one: np.ndarray, other: np.ndarray) -> float:
    """The p-value of Pearson's test that two samples of tokens have one distribution."""
    table = np.stack([np.bincount(sample, minlength=VOCAB) for sample in (one, other)]).astype(np.float64)
    rare = table.sum(axis=0) < RARE
    table = np.concatenate([table[:, ~rare], table[:, rare].sum(axis=1, keepdims=True)], axis=1)
    table = table[:, table.sum(axis=0) > 0]
    if table.shape[1] < 2 or not table.sum(axis=1).all():
        return 1.0
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    return float(jax.scipy.special.gammaincc((table.shape[1] - 1) / 2, statistic / 2))


@cache
def _programs() -> tuple[Any, Any]:
    placement = Placement(make_mesh({}))
    return jax.jit(Sampler(ROWS, placement)), jax.jit(Verifier(ROWS, placement))


def _plain(context: Context, numbers: np.random.Generator) -> np.ndarray:
    """Two tokens of each row, one after the other: [rows, 2]."""
    sampler, _ = _programs()
    slots, found = context.seeded(numbers), []
    for place in range(2):
        rows = RowInputs(*(jnp.asarray(np.broadcast_to(np.int32(value), ROWS)) for value in (0, context.position + place, 1)))
        rows = replace(rows, slots=jnp.arange(ROWS, dtype=jnp.int32))
        logits, mask = (jnp.asarray(np.tile(values[place], (ROWS, 1))) for values in (context.logits, context.masks))
        slots, sampled = sampler(logits, rows, mask, slots)
        found.append(np.asarray(sampled.token))
    return np.stack(found, axis=1)


def _verified(context: Context, numbers: np.random.Generator, draft: int) -> np.ndarray:
    """The tokens of each row that count: [rows, 2], -1 where the draft does not stand."""
    _, verifier = _programs()
    position, lengths = (jnp.full(ROWS, value, jnp.int32) for value in (context.position, 2))
    tokens = jnp.asarray(np.tile(np.array([0, draft], np.int32), (ROWS, 1)))
    rows = DraftRows(jnp.arange(ROWS, dtype=jnp.int32), position, lengths, tokens)
    logits, masks = (jnp.asarray(np.tile(values, (ROWS, 1))) for values in (context.logits, context.masks))
    _, verified = verifier(logits, rows, masks, context.seeded(numbers))
    found = np.array(verified.drawn.token).reshape(ROWS, 2)
    found[np.asarray(verified.counts) < 2, 1] = -1
    return found
