"""The schedule, the order of windows, the loss, and the Orbax checkpoint."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import learner, network
from checkpoints.conversations import COUNTS
from checkpoints.export import Shape
from checkpoints.learner import Learner, Recipe

SHAPE = Shape(50, 16, 24, 1, 2, 1, 8, 64)


def test_the_rate_warms_up_and_falls_to_zero():
    recipe = Recipe(warmup=0.1)
    assert recipe.rate(0.0) == 0.0 and recipe.rate(0.05) == pytest.approx(0.5) and recipe.rate(0.1) == pytest.approx(1.0)
    assert recipe.rate(1.0) == pytest.approx(0.0) and recipe.rate(0.3) > recipe.rate(0.6)
    assert Recipe(2, 8, 3, 4).step_tokens == 28


def test_an_epoch_shows_every_window_once_and_steps_do_not_depend_on_each_other():
    windows = np.arange(10)[:, None]
    seen = np.concatenate([learner.batch(windows, 5, step, 7)[:, 0] for step in range(4)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert np.array_equal(learner.batch(windows, 5, 3, 7)[:, 0], seen[15:])


def _start() -> tuple[Learner, learner.State]:
    net, params = network.make(SHAPE, 0, "xla")
    made = Learner(net, net, Recipe(2, 8, 2, 8))
    return made, made.start(params, jax.tree.map(jnp.copy, params))


def test_the_loss_is_the_cross_entropy_of_counted_tokens():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        made, state = _start()
        tokens = np.random.default_rng(0).integers(0, 50, (2, 9)).astype(np.uint16)
        flagged = tokens.copy()
        flagged[:, 5:] |= COUNTS
        losses = jax.jit(made._window_losses)(state.demo, state.draft, flagged)
        hidden = jax.jit(made.demo.hidden_states)(state.demo, tokens[:, :-1].astype(np.int32))
        logs = jax.nn.log_softmax(made.demo.logits(state.demo, hidden, jnp.dtype(jnp.float32)))
    expected = -np.mean([logs[row, i - 1, tokens[row, i]] for row in range(2) for i in range(5, 9)])
    np.testing.assert_allclose(losses, [expected, expected, 0.0], atol=5e-3)


@pytest.mark.filterwarnings("default")
def test_a_state_is_saved_and_restored(tmp_path: Path):
    _, state = _start()
    state = state._replace(steps=jnp.asarray(17, jnp.int32))
    learner.save(tmp_path / "state", state, 12.5)
    _, other = _start()
    restored, seconds = learner.restore(tmp_path / "state", other._replace(demo=jax.tree.map(jnp.zeros_like, other.demo)))
    assert seconds == 12.5 and int(restored.steps) == 17
    assert all(np.array_equal(restored.demo[name], array) for name, array in state.demo.items())
