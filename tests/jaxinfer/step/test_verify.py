"""The verifier against the sampler called position by position, for every demand: tokens, counts, slots."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.batch import Admission
from jaxinfer.models.layers import Placement
from jaxinfer.request import Request, SamplingParams
from jaxinfer.sampling import ALL_ALLOWED
from jaxinfer.sharding import make_mesh
from jaxinfer.step import slots
from jaxinfer.step.forward import Demand, DraftRows, RowInputs, Sampler
from jaxinfer.step.verify import Verifier

VOCAB, WIDTH, SPARE = 24, 4, 5
LOGITS = np.random.default_rng(2).normal(0, 1.5, (SPARE, WIDTH, VOCAB)).astype(np.float32)
LENGTHS = np.array([4, 4, 2, 1, 0], np.int32)
PLACEMENT = Placement(make_mesh({}))
GREEDY = SamplingParams(temperature=0)
DRAWN = SamplingParams(temperature=0.9, seed=1)
RULED = replace(DRAWN, top_k=9, top_p=0.9, frequency_penalty=1.5, repetition_penalty=1.3, bad_words=("x",), logprobs=1, min_tokens=3)


def state(params):
    found = slots.neutral(SPARE + 1, VOCAB)
    for slot in range(SPARE):
        admission = Admission(Request("r", (1, 2, 3), params), slot, (4, 5))
        words = slots.pack_admission(admission, slots.Draws(slot * 77, (7,), [(5, 9), (3,)]), 16)
        found = jax.jit(slots.admit)(found, words)
    return found


def step_by_step(params, demand, drafts, masks):
    """What plain decoding draws in each row, and the slots after it."""
    sampler, current, tokens = jax.jit(Sampler(SPARE, PLACEMENT, demand)), state(params), []
    going = LENGTHS > 0
    for place in range(WIDTH):
        rows = RowInputs(jnp.arange(SPARE, dtype=jnp.int32), jnp.full(SPARE, 5 + place, jnp.int32), jnp.asarray(going, dtype=jnp.int32))
        current, sampled = sampler(jnp.asarray(LOGITS[:, place]), rows, jnp.asarray(masks[:, place]), current)
        tokens.append(np.where(going, np.asarray(sampled.token), -1))
        following = drafts[:, place + 1] if place + 1 < WIDTH else np.full(SPARE, -1)
        going = going & (tokens[-1] == following) & (place + 1 < LENGTHS)
    return np.stack(tokens, 1), current


def rows_of(position, drafts):
    columns = (np.arange(SPARE, dtype=np.int32), np.full(SPARE, position, np.int32), LENGTHS, drafts)
    return DraftRows(*map(jnp.asarray, columns))


KINDS = [
    (GREEDY, Demand.GREEDY), (RULED, Demand.FULL),
    *(pytest.param(*longer, marks=pytest.mark.ci) for longer in ((DRAWN, Demand.DRAWN), (GREEDY, Demand.FULL))),
]  # fmt: skip


@pytest.mark.parametrize(("params", "demand"), KINDS)
def test_it_draws_what_plain_decoding_draws(params, demand):
    masks = np.full((SPARE, WIDTH, 1), ALL_ALLOWED)
    if demand is Demand.FULL:
        masks[0, 1] = 0b1111_0101_1010_1111_0000_1111
    drafts = np.zeros((SPARE, WIDTH), np.int32)
    for place in range(1, WIDTH):  # right as far as it goes, but row 1, whose second draft is wrong
        found, _ = step_by_step(params, demand, drafts, masks)
        drafts[:, place] = np.maximum(found[:, place - 1], 0)
        drafts[1, place] += place == 2
    wanted, after = step_by_step(params, demand, drafts, masks)
    rows = rows_of(5, drafts)
    run = jax.jit(Verifier(SPARE, PLACEMENT, demand))
    found, verified = run(LOGITS.reshape(-1, VOCAB), rows, masks.reshape(-1, 1), state(params))
    assert verified.counts.tolist() == [4, 2, 2, 1, 0]
    kept = np.arange(WIDTH) < np.asarray(verified.counts)[:, None]
    np.testing.assert_array_equal(np.where(kept, np.asarray(verified.drawn.token).reshape(SPARE, WIDTH), -1), wanted)
    for name in ("last_token", "counts", "recent"):
        np.testing.assert_array_equal(getattr(found, name)[:SPARE], getattr(after, name)[:SPARE], err_msg=name)


def test_nothing_counts_behind_numbers_that_are_not_finite():
    logits = LOGITS.copy()
    logits[0, 1] = np.nan
    for demand in Demand:
        drafts = np.tile(logits.argmax(2)[:, :1], (1, WIDTH)).astype(np.int32)
        drafts[:, 2:] = 0
        rows = rows_of(9, drafts)
        masks = np.full((SPARE * WIDTH, 1), ALL_ALLOWED)
        _, verified = jax.jit(Verifier(SPARE, PLACEMENT, demand))(logits.reshape(-1, VOCAB), rows, masks, state(GREEDY))
        assert verified.counts[0] == 2
        assert verified.drawn.finite[:2].tolist() == [True, False]


def test_a_benchmark_may_toss_coins_instead():
    """As often as it says, the same ones each time, whatever the demand; and no row beyond its length."""
    masks, drafts, start = np.full((SPARE * WIDTH, 1), ALL_ALLOWED), np.zeros((SPARE, WIDTH), np.int32), state(GREEDY)
    counts = {}
    for demand in (Demand.GREEDY, Demand.FULL):
        run = jax.jit(Verifier(SPARE, PLACEMENT, demand, forced=0.7))
        steps = (run(LOGITS.reshape(-1, VOCAB), rows_of(position, drafts), masks, start)[1] for position in range(5, 205))
        counts[demand] = np.array([np.asarray(step.counts) for step in steps])
    found = counts[Demand.GREEDY]
    assert (found == counts[Demand.FULL]).all()
    assert abs(found[:, :2].mean() - (1 + 0.7 + 0.7**2 + 0.7**3)) < 0.2
    assert (found.max(0) == LENGTHS).all()
