"""What counts as the same answer: bits where they are promised, elsewhere near ties, and nothing else."""

import jax.numpy as jnp
import pytest

from jaxinfer import sampling
from jaxinfer.request import FinishReason, Request, SamplingParams, TokenLogprob
from jaxinfer.selftest.answers import DRIFT, Judge, drift_of, gumbel, judged
from jaxinfer.selftest.stand import Answer

GREEDY = Request("one", (1, 2), SamplingParams(temperature=0, logprobs=2))
SAMPLED = Request("one", (1, 2), SamplingParams(temperature=0.5, seed=3, logprobs=2))
FILTERED = Request("one", (1, 2), SamplingParams(temperature=0.5, seed=3, top_k=4, logprobs=2))
BOUND = DRIFT["bfloat16"] * 2


def answer(*tokens, shift=0.0, reason=FinishReason.LENGTH):
    """Tokens 7 and 8 are the two candidates, at -1 and -2."""
    scores = {7: -1.0 + shift, 8: -2.0}
    return Answer(list(tokens), [TokenLogprob(token, scores[token], tuple(scores.items())) for token in tokens], reason)


def compare(one, other, request=GREEDY, *, exact=False, dtype="bfloat16", noise=lambda *_: 0.0):
    return Judge(exact, dtype, noise).compare([request], {request.key: one}, {request.key: other})


@pytest.mark.parametrize("exact", [True, False])
def test_the_same_is_the_same(exact):
    tally = compare(answer(7, 8), answer(7, 8), exact=exact)
    assert (tally.sequences, tally.tokens, tally.faults, tally.drift) == (1, 2, 0, 0.0)
    assert "first_faults" not in tally.figures()


def test_bits_are_bits():
    assert compare(answer(7, 8), answer(7, 8, shift=1e-12), exact=True).faults == 1
    tally = compare(answer(7, 7), answer(7, 8), exact=True)
    assert (tally.faults, tally.differing_tokens, tally.figures()["differing_share"]) == (1, 1, 0.5)
    assert "output 1" in tally.first_faults[0]


def test_drift_has_a_bound():
    assert compare(answer(7), answer(7, shift=BOUND * 0.9)).faults == 0
    assert compare(answer(7), answer(7, shift=-BOUND * 1.1)).faults == 1
    assert drift_of(answer(7).scores[0], TokenLogprob(3, -4.0)) == 0.0


def test_greedy_tokens_part_at_near_ties_alone():
    assert compare(answer(7), answer(8)).faults == 1
    near = Answer([8], [TokenLogprob(8, -1.001, ((7, -1.001), (8, -1.001)))], FinishReason.LENGTH)
    mine = Answer([7], [TokenLogprob(7, -1.0, ((7, -1.0), (8, -1.002)))], FinishReason.LENGTH)
    tally = compare(mine, near)
    assert (tally.faults, tally.near_ties) == (0, 1)
    assert compare(mine, near, dtype="float32").faults == 1


def test_sampled_tokens_part_where_noise_makes_a_tie():
    assert compare(answer(7), answer(8), SAMPLED).faults == 1
    tie = compare(
        answer(7), answer(8), SAMPLED, noise=lambda seed, position, token: {(3, 2, 7): 0.0, (3, 2, 8): 2.0}[seed, position, token]
    )
    assert (tie.faults, tie.near_ties) == (0, 1)


def test_filtered_tokens_are_judged_in_float32_alone():
    assert not judged(FILTERED.params) and judged(SAMPLED.params)
    assert not judged(SamplingParams(temperature=0, logit_bias={1: 1.0})) and judged(SamplingParams(temperature=0, top_k=3))
    tally = compare(answer(7), answer(8), FILTERED)
    assert (tally.faults, tally.unjudged) == (0, 1)
    assert compare(answer(7), answer(8), FILTERED, dtype="float32").faults == 1


def test_ends_must_agree():
    assert compare(answer(7), answer(7, reason=FinishReason.STOP)).faults == 1
    assert compare(answer(7, 8), answer(7)).faults == 1


def test_the_noise_is_the_samplers():
    """With equal logits the sampler draws the token of the largest noise."""
    noise, seed, position = gumbel(16), -5, 9
    largest = max(range(16), key=lambda token: noise(seed, position, token))
    one, whole = jnp.ones(1, jnp.float32), jnp.array([position], jnp.int32)
    settings = dict.fromkeys(("temperature", "top_p", "min_p", "presence", "frequency", "repetition"), one)
    halves = jnp.array([[seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF]], jnp.uint32)
    described = sampling.unchecked(sampling.RowSettings, {**settings, "seed": halves, "position": whole})
    drawn = sampling.draw(jnp.zeros((1, 16), jnp.float32), described)
    assert int(drawn[0]) == largest
