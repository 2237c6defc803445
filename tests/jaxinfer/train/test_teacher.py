"""Whole texts through a model file are what paged steps compute, and taps keep the residual stream."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models.layers import Sequences, StepContext
from jaxinfer.train.rows import Text, pack
from tests.driving import Driver
from tests.jaxinfer.train.conftest import LENGTH, teacher_of

TEXTS = [(5, 9, 200, 31, 77), (7, 8, 120), (1, 2, 3, 4, 5, 6)]


def test_packed_texts_do_not_see_each_other(target):
    teacher, rows = teacher_of(target), pack([Text(tokens, 1) for tokens in TEXTS], LENGTH)
    leaves = teacher.load()

    def run(leaves, tokens, positions):
        seen = teacher.look(leaves, tokens, StepContext(positions, Sequences(LENGTH), teacher.placement), (0, 2, 1))
        return teacher.head(leaves, seen.hidden), seen.features

    logits, features = jax.jit(run)(leaves, jnp.asarray(rows.tokens.reshape(-1)), jnp.asarray(rows.positions.reshape(-1)))
    driver = Driver(teacher.graph, leaves)
    paged = driver.logits(TEXTS, [[len(tokens) for tokens in TEXTS]])
    for number, expected in enumerate(paged):
        assert np.allclose(np.asarray(logits)[rows.owner.reshape(-1) == number], expected, atol=1e-5)
    embedded = np.asarray(teacher.graph.weights(leaves)["embedding.weight"])[rows.tokens.reshape(-1)]
    before, last, middle = np.split(np.asarray(features), 3, axis=1)
    assert np.array_equal(before, embedded) and not np.allclose(middle, before) and not np.allclose(last, middle)
    norm = last / np.sqrt(np.mean(last**2, axis=1, keepdims=True) + teacher.graph.config.rms_norm_epsilon)
    head = np.asarray(teacher.graph.weights(leaves)["lm_head.weight"])
    assert np.allclose(norm @ head.T, logits, atol=1e-4), "norms of made-up weights are 1"
