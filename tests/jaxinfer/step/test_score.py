"""Scores of prompts against a plain log softmax: targets across chunks and replicas, blocks with and without any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.batch import LAST_SAMPLED, Batch, Row
from jaxinfer.request import Request, SamplingParams
from jaxinfer.step import score
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.inputs import Shapes, pack
from jaxinfer.step.score import NO_TARGET, Score
from tests.driving import Driver

SHAPES = Shapes(Bucket(prefill_tokens=12, prefill_rows=3, decode_rows=2), 2, 8, 4, spare_slot=9)
PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
ASKED, SILENT = SamplingParams(prompt_logprobs=2), SamplingParams(logprobs=2)


def row(start, count, *, params=ASKED, replica=0, prompt=PROMPT):
    tokens = (*prompt, 70, 71)[start : start + count]
    return Row(Request("r", prompt, params), 0, start, tokens, (1, 2, 3), samples=start + count >= len(prompt), replica=replica)


def test_targets_are_the_prompts_own_next_tokens():
    batch = Batch((row(7, 1, params=ASKED),), (row(0, 3), row(2, 4, params=SILENT), row(5, 5), row(3, 2, replica=1)))
    packed = pack(batch, SHAPES)
    none, targets = [NO_TARGET], score.pack_targets(packed).tolist()
    assert targets[0] == [1, 4, 1, *(none * 4), 2, 6, *(none * 3)]
    assert targets[1] == [5, 9, *(none * 10)]
    assert [(r.start, at) for r, at in score.places(packed)] == [(0, 0), (5, 7), (3, 12)]


@pytest.mark.parametrize("prefills", [(), (row(0, 3, params=SILENT),), (row(7, 1),), (row(0, 1, prompt=(5,)),)])
def test_nobody_asks(prefills):
    decode = Row(Request("r", PROMPT, ASKED), 0, 8, (LAST_SAMPLED,), (1, 2, 3), samples=True)
    assert score.pack_targets(pack(Batch((decode,), prefills), SHAPES)) is None


def test_scores_are_those_of_a_log_softmax():
    logits = np.random.default_rng(0).normal(0, 3, (5, 30)).astype(np.float32)
    logits[2] = 0.0
    target = np.array([4, 29, 7, 0, int(logits[4].argmax())], np.int32)
    found = jax.jit(score.score)(jnp.asarray(logits), jnp.asarray(target))
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(found.logprob, exact[np.arange(5), target], atol=1e-5)
    assert found.rank.tolist() == [(exact[i] >= exact[i, t]).sum() for i, t in enumerate(target)]
    assert found.rank[2] == 30
    assert found.rank[4] == 1
    assert found.top_tokens[4, 0] == target[4]
    assert found.top_logprobs[4, 0] == found.logprob[4]  # the identical number
    np.testing.assert_array_equal(found.top_tokens[0], np.argsort(-exact[0], kind="stable")[:20])


def test_blocks_are_put_together_again(monkeypatch):
    monkeypatch.setattr(score, "BLOCK", 5)
    values = np.arange(2 * 12 * 3).reshape(2, 12, 3)
    blocks = score._blocks(jnp.asarray(values), -7)
    assert blocks.shape == (3, 2, 5, 3)
    assert (np.asarray(blocks[2, :, 2:]) == -7).all()
    np.testing.assert_array_equal(score._joined(blocks, 2, 12), values.reshape(24, 3))


def test_only_blocks_with_targets_cost_anything(monkeypatch):
    monkeypatch.setattr(score, "BLOCK", 4)
    driver = Driver.golden("grouped")
    graph, head = driver.graph, driver.graph.bind(driver.leaves).head
    hidden = np.random.default_rng(1).normal(size=(2 * 14, graph.config.hidden_size)).astype(np.float32)
    targets = np.full((2, 12), NO_TARGET, np.int32)
    targets[0, :2], targets[1, 3] = [5, 6], 10
    found = jax.jit(Score(graph, SHAPES, driver.placement))(driver.leaves, hidden, targets)
    exact = jax.nn.log_softmax(head(jnp.asarray(hidden), driver.placement), axis=-1).reshape(2, 14, -1)[:, 2:]
    for replica, place, target in ((0, 0, 5), (0, 1, 6), (1, 3, 10)):
        np.testing.assert_allclose(found.logprob[replica * 12 + place], exact[replica, place, target], atol=1e-5)
    top = np.asarray(found.top_logprobs).reshape(2, 12, -1)
    assert top[:, :4].any(axis=-1).all()
    assert not top[:, 4:].any()
