"""Draws on the host: one for a plain row, as many as count for a row with drafts, log probabilities only where asked for."""

import jax.numpy as jnp
import numpy as np

from jaxinfer.batch import LAST_SAMPLED, Batch, Row
from jaxinfer.engine.drawn import fetch
from jaxinfer.request import Request, SamplingParams
from jaxinfer.sampling import IMPOSSIBLE, Sampled
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.inputs import Shapes, pack
from jaxinfer.step.verify import Verified


def sampled(count):
    tokens = jnp.arange(100, 100 + count, dtype=jnp.int32)
    top = (jnp.tile(tokens[:, None], (1, 2)), jnp.zeros((count, 2), jnp.float32))
    return Sampled(tokens, tokens.at[1].set(IMPOSSIBLE), -jnp.arange(count, dtype=jnp.float32), *top)


def packed(width, *rows):
    return pack(Batch(rows, ()), Shapes(Bucket(0, 0, 2, width), 1, 2, 4, 2))


def row(name, *drafts, logprobs=None):
    return Row(Request(name, (1,), SamplingParams(logprobs=logprobs)), 0, 1, (LAST_SAMPLED, *drafts), (1, 2), samples=True)


def test_a_plain_row_has_one_token():
    found = fetch(packed(1, row("a"), row("b", logprobs=1)), sampled(2))
    assert [[item.token for item in found[index]] for index in (0, 1)] == [[100], [IMPOSSIBLE]]
    assert found[0][0].logprob is None
    assert found[1][0].logprob.logprob == -1.0 and found[1][0].logprob.top == ((101, 0.0),)


def test_a_row_with_drafts_has_what_counts():
    found = fetch(packed(3, row("a", 5, 6), row("b", 7, logprobs=0)), Verified(sampled(6), jnp.array([1, 2], np.int32)))
    assert [[item.token for item in found[index]] for index in (0, 1)] == [[100], [103, 104]]
    assert [item.logprob.logprob for item in found[1]] == [-3.0, -4.0]
