"""What is around the kernels of several tokens, with a kernel that only notes what it is given."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.token_chain.reference import Weight

several = pytest.importorskip("pallas_kernels.token_chain.gpu_several")
Link = pytest.importorskip("pallas_kernels.hopper_folds").Link
B = jnp.bfloat16
X, HELD = jnp.full((3, 4), 2, B), jnp.full((3, 4), 1, B)
WEIGHTS = [Weight(2 * jnp.eye(4, dtype=B)), Weight(jnp.eye(4, dtype=B))]
LINKS = [Link(4, 4, epsilon=0.0), Link(4, 4, epsilon=0.0)]
NORM = jnp.full((4,), 3, B)


def ran(monkeypatch, norms, interpreting, stream=None):
    """What `run` gives, and what its kernel was given each time."""
    monkeypatch.setattr(hopper, "interpreting", lambda: interpreting)
    seen = []

    def launch(x, held, weights, norms, counters, *, plan, interpreted):
        seen.append((x, held, len(weights), len(norms), counters, plan, interpreted))
        return x, stream

    kernel = several.Kernel(lambda tokens: tokens + -tokens % 8, lambda links, tokens: ([link.normed for link in links], tokens), launch)
    return several.run(kernel, X, HELD, WEIGHTS, norms, LINKS, "counters"), seen


def test_a_norm_in_front_is_outside_and_tokens_are_filled_up(monkeypatch):
    stream = jnp.full((8, 4), 7, B)
    (out, total), [(x, held, *others)] = ran(monkeypatch, [NORM, NORM], False, stream)
    assert x.shape == held.shape == (8, 4) and out.shape == total.shape == (3, 4)
    assert np.all(x[:3] == 3) and np.all(held[:3] == 3) and np.all(total == 7)  # 2 + 1, of which the norm makes ones
    assert others == [2, 1, "counters", ([False, True], 8), False]


def test_without_a_norm_behind_it_the_residual_stream_is_what_it_was(monkeypatch):
    (_, total), [(x, held, *_)] = ran(monkeypatch, [None, None], False)
    assert held is None and np.all(total == 1) and np.all(x[:3] == 2)


def test_the_interpreter_is_given_links_one_by_one(monkeypatch):
    (out, total), seen = ran(monkeypatch, [None, NORM], True)
    assert [each[2:] for each in seen] == [(1, 0, None, ([False], 8), True)] * 2
    assert np.all(out == 3) and np.all(total == 3)
