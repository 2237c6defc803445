"""The divergence is KL over the vocabulary, block by block as at once, at the places that count alone."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models import llama
from jaxinfer.models.graph import Graph
from jaxinfer.models.layers import Placement, Sequences, StepContext
from jaxinfer.sharding import make_mesh
from jaxinfer.train import divergence
from jaxinfer.train.divergence import Counted
from jaxinfer.train.student import Lesson
from jaxinfer.train.teacher import Seen, Teacher

VOCAB, EMBED = 7, 5
RANDOM = np.random.default_rng(0)


def softmax(x):
    shares = np.exp(x - x.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def kl(p, q):  # of probabilities
    return np.sum(p * (np.log(p) - np.log(q)), axis=-1)


@dataclass(frozen=True)
class Head(Teacher):
    """A teacher that is a matrix."""

    def head(self, leaves, hidden):
        return hidden @ leaves[0]


class Stub:
    """Hidden states that are its weights, and a head that is a fixed matrix."""

    specs, tapped = {}, ()

    def __init__(self, depth, vocabulary):
        self.depth, self.vocabulary = depth, vocabulary
        self.matrix = RANDOM.normal(size=(EMBED, VOCAB if vocabulary is None else len(vocabulary))).astype(np.float32)

    def begin(self):
        return {}

    def hidden(self, weights, lesson):
        return tuple(weights[f"hidden{ahead}"] for ahead in range(self.depth))

    def head(self, weights, hidden, leaves):
        return hidden @ self.matrix

    def save(self, folder, weights):
        return {}


def test_kl_is_zero_where_distributions_agree_and_counts_no_impossible_token():
    logits = RANDOM.normal(size=(3, VOCAB)).astype(np.float32)
    other = RANDOM.normal(size=(3, VOCAB)).astype(np.float32)
    assert np.allclose(divergence.kl(jnp.asarray(logits), jnp.asarray(logits + 3)), 0, atol=1e-6)
    assert np.allclose(divergence.kl(jnp.asarray(logits), jnp.asarray(other)), kl(softmax(logits), softmax(other)), atol=1e-6)
    never = logits.copy()
    never[:, 0] = -np.inf
    assert np.allclose(divergence.kl(jnp.asarray(never), jnp.asarray(other)), kl(softmax(logits[:, 1:]), softmax(other)[:, 1:]), atol=1e-5)


@pytest.mark.parametrize("replicas", [1, 2])
def test_blocks_keep_replicas_apart_and_are_put_together_again(replicas):
    values = jnp.arange(20).reshape(10, 2)
    cut = divergence.blocks(values, replicas, 3)
    assert cut.shape[1:] == (3 * replicas, 2) and np.array_equal(divergence.unblocked(cut, replicas, 10), values)


@pytest.mark.parametrize("vocabulary", [None, np.array([6, 1, 3])], ids=["whole", "part"])
def test_each_token_ahead_is_compared_with_what_the_target_made_of_it(monkeypatch, vocabulary):
    monkeypatch.setattr(divergence, "BLOCK", 4)
    positions = np.array([0, 1, 2, 3, 0, 1, 2, -1], np.int32)
    learned = np.array([False, True, True, False, True, True, False, False])
    warmth = np.array([1, 1, 0.5, 1, 0.7, 0.7, 0.7, 1], np.float32)
    hidden, theirs = (RANDOM.normal(size=(8, EMBED)).astype(np.float32) for _ in range(2))
    matrix, student = RANDOM.normal(size=(EMBED, VOCAB)).astype(np.float32), Stub(2, vocabulary)
    placement = Placement(make_mesh({}))
    teacher = Head(Path(), "matrix", Graph.of(llama, llama.TINY, np.float32), placement)
    weights = {"hidden0": jnp.asarray(hidden), "hidden1": jnp.asarray(hidden * 2)}
    context = StepContext(jnp.asarray(positions), Sequences(8), placement)
    lesson = Lesson(jnp.asarray(positions), context, jnp.zeros((8, 0)), (jnp.asarray(matrix),))
    seen = Seen(jnp.asarray(theirs), jnp.zeros((8, 0)))

    def measure(weights):
        return divergence.divergence(teacher, student, weights, lesson, seen, Counted(jnp.asarray(learned), jnp.asarray(warmth)))

    def apart(there, at, scale):
        target, own = theirs[there] @ matrix, scale * hidden[at] @ student.matrix
        known = target if vocabulary is None else target[vocabulary]
        return warmth[there] * kl(softmax(known / warmth[there]), softmax(own / warmth[there]))

    first, second = [apart(at, at, 1) for at in (1, 2, 4, 5)], [apart(at + 1, at, 2) for at in (0, 1, 4)]
    found = measure(weights)
    assert np.allclose(found.ahead, [np.mean(first), np.mean(second)], atol=1e-5)
    assert np.allclose(found.loss, (found.ahead[0] + 0.8 * found.ahead[1]) / 1.8)
    slopes = jax.grad(lambda weights: measure(weights).loss)(weights)
    assert set(np.flatnonzero(np.abs(slopes["hidden0"]).sum(axis=1))) == {1, 2, 4, 5}
    assert set(np.flatnonzero(np.abs(slopes["hidden1"]).sum(axis=1))) == {0, 1, 4}
