"""A prompt's entries from its chunks, in any order and any number of times."""

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.batch import Row
from jaxinfer.engine.scores import PromptScores
from jaxinfer.request import Request, SamplingParams, TokenLogprob
from jaxinfer.step.score import Scored

PROMPT = (7, 5, 9, 4)
REQUEST = Request("r", PROMPT, SamplingParams(prompt_logprobs=1))
ONE, TOP = jnp.arange(6), jnp.arange(18).reshape(6, 3)
FOUND = jax.device_get(Scored(ONE.astype(jnp.float32), ONE, TOP, TOP.astype(jnp.float32)))


def chunk(start, *tokens):
    return Row(REQUEST, 0, start, tokens, (1, 2), samples=start + len(tokens) >= len(PROMPT))


def entry(place, index):
    return TokenLogprob(PROMPT[place], float(index), ((index * 3, index * 3),), index)


def test_chunks_fill_the_places_after_each_of_their_tokens():
    scores = PromptScores(REQUEST)
    scores.take(chunk(0, 7), FOUND, 2)
    scores.take(chunk(1, 5, 9, 4), FOUND, 3)
    assert scores.entries() == (None, entry(1, 2), entry(2, 3), entry(3, 4))
    scores.take(chunk(0, *PROMPT, 33, 34), FOUND, 0)  # again, with tokens that were generated before a preemption
    assert scores.entries() == (None, entry(1, 0), entry(2, 1), entry(3, 2))


def test_a_gap_is_an_error():
    scores = PromptScores(REQUEST)
    scores.take(chunk(0, 7, 5), FOUND, 0)
    with pytest.raises(RuntimeError, match="not scored"):
        scores.entries()


def test_a_prompt_of_one_token_has_nothing_to_score():
    assert PromptScores(Request("r", (3,), SamplingParams(prompt_logprobs=0))).entries() == (None,)
