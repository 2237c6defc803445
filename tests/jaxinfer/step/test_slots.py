"""Per-request state on the device: what is admitted is what the sampler reads, and slots do not touch each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.batch import Admission
from jaxinfer.request import MAX_ALLOWED_TOKENS, MAX_LOGIT_BIAS, MAX_STOP_TOKENS, Request, SamplingParams
from jaxinfer.step import slots as state
from jaxinfer.step.slots import BANNED, BANNED_LENGTH, HELD, NO_TOKEN, Draws, Slots

SLOTS, VOCAB, LONGEST = 4, 24, 16
FULL = SamplingParams(
    temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=0.25, frequency_penalty=-0.5, repetition_penalty=1.5, logprobs=3,
    min_tokens=2, logit_bias={3: 1.5, 9: -100.0},
)  # fmt: skip


def fresh():
    return jax.tree.map(jnp.asarray, state.neutral(SLOTS + 1, VOCAB))


def words(slot, params, *, prompt=(5, 6, 5), generated=(), seed=0, held=(), banned=()):
    return state.pack_admission(Admission(Request("r", prompt, params), slot, generated), Draws(seed, held, banned), LONGEST)


admit = jax.jit(state.admit)


def admitted(slot, params, **values):
    return admit(fresh(), words(slot, params, **values))


def asked(slots, rows, positions=None):
    rows = jnp.asarray(rows, jnp.int32)
    return state.settings(slots, rows, jnp.zeros_like(rows) if positions is None else jnp.asarray(positions, jnp.int32))


def test_the_sampler_reads_what_was_admitted():
    slots = admitted(2, FULL)
    found = asked(slots, [2], [8])
    for name, value in {
        "temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "presence": 0.25, "frequency": -0.5, "repetition": 1.5, "top_k": 7, "logprobs": 3,
        "position": 8,
    }.items():  # fmt: skip
        assert getattr(found, name)[0].item() == np.float32(value).item(), name
    assert asked(admitted(0, SamplingParams(top_k=-1)), [0]).top_k.tolist() == [0]
    assert asked(admitted(0, SamplingParams()), [0]).logprobs.tolist() == [-1]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1, 0x1234567890ABCDEF])
def test_seeds_keep_all_their_bits(seed):
    high, low = asked(admitted(1, SamplingParams(), seed=seed), [1]).seed[0].tolist()
    assert (high << 32 | low) == seed % 2**64


def test_an_admission_leaves_the_other_slots_alone():
    before = admit(admit(fresh(), words(1, FULL, seed=5)), words(3, SamplingParams(presence_penalty=1.0), prompt=(7,)))
    after = admit(before, words(2, FULL, held=(1, 2)))
    others = np.array([0, 1, 3, 4])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[others], np.asarray(b)[others]), before, after)


def test_an_admission_forgets_who_was_there_before():
    dirty = admit(fresh(), words(2, FULL, held=(1,), generated=(8, 8)))
    clean = admit(dirty, words(2, SamplingParams()))
    expected = admitted(2, SamplingParams())
    jax.tree.map(np.testing.assert_array_equal, clean, expected)


def test_tokens_are_counted_for_penalties_alone():
    slots = admitted(1, FULL, prompt=(5, 6, 5), generated=(8, 5, 8))
    counts = np.zeros(VOCAB, np.int32)
    counts[[5, 8]] = [1, 2]
    np.testing.assert_array_equal(slots.counts[1], counts)
    assert np.flatnonzero(slots.in_prompt[1]).tolist() == [5, 6]
    assert slots.last_token[1] == 8
    plain = admitted(1, SamplingParams(), generated=(8,))
    assert not plain.counts.any()
    assert not plain.in_prompt.any()
    assert plain.last_token[1] == 8


def test_recording_is_like_having_been_admitted_later():
    slots = admitted(1, FULL)
    record = jax.jit(state.record)
    for token in (8, 5, 8):
        slots = record(slots, jnp.array([1, SLOTS], jnp.int32), jnp.array([token, 0], jnp.int32))
    again = admitted(1, FULL, generated=(8, 5, 8))
    for name in ("last_token", "counts", "in_prompt", "recent"):
        np.testing.assert_array_equal(getattr(slots, name)[1], getattr(again, name)[1], err_msg=name)


def test_biases_are_added_where_they_belong():
    slots = admit(admitted(1, FULL), words(2, SamplingParams(logit_bias={0: 2.0})))
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, VOCAB)).astype(np.float32))
    found = state.ruled(logits, slots, jnp.array([1, 2, 0]), jnp.array([9, 9, 9]))
    wanted = np.array(logits)
    wanted[0, 3] += 1.5
    wanted[0, 9] -= 100
    wanted[1, 0] += 2
    np.testing.assert_array_equal(found, wanted)


def test_held_tokens_are_out_until_the_output_is_long_enough():
    slots = admitted(0, FULL, prompt=(1, 2, 3), held=(4, 11))
    logits = jnp.zeros((4, VOCAB))
    found = np.asarray(state.ruled(logits, slots, jnp.array([0, 0, 0, 1]), jnp.array([3, 4, 5, 0])))
    assert np.flatnonzero(found[0] == -np.inf).tolist() == [4, 11]
    assert np.flatnonzero(found[1] == -np.inf).tolist() == [4, 11]
    assert np.isfinite(found[2:]).all()


def excluded(slots, rows):
    """Which tokens each row may not draw."""
    rows = jnp.asarray(rows, jnp.int32)
    found = np.asarray(jax.jit(state.ruled)(jnp.zeros((len(rows), VOCAB)), slots, rows, jnp.full_like(rows, 9)))
    return [np.flatnonzero(row == -np.inf).tolist() for row in found]


def test_the_last_token_of_a_banned_sequence_is_out_where_the_others_came_before():
    banned = ((4,), (5, 6), (6, 5, 7), (1, 1, 1, 1, 1, 1, 1, 2))
    slots = admitted(1, SamplingParams(), prompt=(5, 6), banned=banned)
    record = jax.jit(state.record)
    assert excluded(slots, [0, 1]) == [[], [4]]  # the prompt does not count
    for token, out in ((5, [4, 6]), (6, [4]), (5, [4, 6, 7]), (7, [4]), *([(1, [4])] * 6), (1, [2, 4])):
        slots = record(slots, jnp.array([1, SLOTS], jnp.int32), jnp.array([token, 5], jnp.int32))
        assert excluded(slots, [0, 1]) == [[], out], token
    assert excluded(admitted(1, SamplingParams(), generated=(9, 9, 9, 9, 9, 9, 6, 5), banned=banned), [1]) == [[4, 6, 7]]


def test_only_allowed_tokens_are_left():
    slots = admit(admitted(1, SamplingParams(allowed_token_ids=[2, 9, 2])), words(2, SamplingParams(), banned=((3,),)))
    slots = admit(slots, words(3, SamplingParams(allowed_token_ids=[0, 5]), banned=((5,),)))
    rest = [token for token in range(VOCAB) if token not in (2, 9)]
    assert excluded(slots, [0, 1, 2, 3]) == [[], rest, [3], list(range(1, VOCAB))]


def test_the_largest_request_fits():
    params = SamplingParams(logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0), allowed_token_ids=range(MAX_ALLOWED_TOKENS))
    banned = [tuple(range(i, i + BANNED_LENGTH)) for i in range(BANNED)]
    packed = words(0, params, prompt=tuple(range(LONGEST)), held=range(HELD), banned=banned)
    assert packed.shape == (state.admission_words(LONGEST),)
    assert HELD == 2 * MAX_STOP_TOKENS
    assert NO_TOKEN > 1 << 30


def test_nobody_wakes_the_work_that_nobody_wants():
    slots = admitted(1, SamplingParams())
    rows = jnp.array([1, SLOTS], jnp.int32)
    assert not state.has_rules(slots, rows)
    found = asked(slots, rows)
    assert found.temperature.tolist() == [1.0, 0.0]
    assert (found.repetition == 1).all()
    assert (found.presence == 0).all()
    assert (found.logprobs == -1).all()
    assert (found.top_p == 1).all()
    assert state.has_rules(admitted(1, SamplingParams(logit_bias={0: 0.0})), rows)
    assert state.has_rules(admitted(1, SamplingParams(min_tokens=1), held=(2,)), rows)
    assert state.has_rules(admitted(1, SamplingParams(), banned=((2,),)), rows)
    assert state.has_rules(admitted(1, SamplingParams(allowed_token_ids=[0])), rows)


def test_descriptions_match_what_is_made():
    described = state.describe(SLOTS + 1, VOCAB)
    made = fresh()
    assert isinstance(described, Slots)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(described)] == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(made)]
