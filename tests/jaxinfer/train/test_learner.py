"""KL goes down, a mesh changes nothing, and settings that make no sense are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.config import ConfigError
from jaxinfer.train.learner import Recipe
from tests.jaxinfer.train.conftest import enrol


def test_the_student_comes_nearer(school):
    state = school.run(school.learner.start(), 12)
    losses = np.asarray(state.losses)
    assert int(state.step) == 12 and losses[-1] < 0.6 * losses[0] and np.isfinite(losses).all()


def test_the_same_steps_give_the_same_bits(school):
    one, other = (school.run(school.learner.start(), 3) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.ci
def test_a_mesh_changes_rounding_alone(school, target, small):
    meshed = enrol(target, small, {"data": 2, "tensor": 2})
    one, other = school.run(school.learner.start(), 3), meshed.run(meshed.learner.start(), 3)
    assert np.allclose(one.losses, other.losses, rtol=1e-4)
    weights = other.weights["layers.0.mlp.gate_up.weight"]
    moments = [leaf for leaf in jax.tree.leaves(other.moments) if leaf.shape == weights.shape]
    assert tuple(weights.sharding.spec) == (None, "tensor", None) and len(moments) == 2
    assert all(leaf.sharding == weights.sharding for leaf in moments)


def test_the_rate_rises_and_falls():
    rates = [float(Recipe(steps=100, learning_rate=0.5, warmup=0.1).rate(jnp.float32((step + 1) / 100))) for step in range(100)]
    assert rates[0] == pytest.approx(0.05) and max(rates) == pytest.approx(0.5, rel=0.01) and np.argmax(rates) == 9
    assert rates[-1] == pytest.approx(0, abs=1e-6) and sorted(rates[9:], reverse=True) == rates[9:]


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"steps": 0}, "--steps 0"), ({"rows": 0}, "--batch 0"), ({"learning_rate": 3.0}, "--learning-rate 3"), ({"seed": -1}, "--seed -1"),
     ({"seconds": 0.0}, "--seconds 0")],
)
def test_what_makes_no_sense(changes, said):
    with pytest.raises(ConfigError, match=said):
        Recipe(**changes)
