"""The stream's sum and norm, on one device and on several, and how layers are run."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.layers import Placement, RMSNorm, Sequences, StepContext
from jaxinfer.models.residual import LayerResult, Stream, through
from jaxinfer.sharding import make_mesh
from pallas_kernels import Normed, dispatch

RANDOM = np.random.default_rng(0)
BF16 = np.dtype(jnp.bfloat16)


def drawn(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), BF16)


def norm_of(size, offset):
    norm = RMSNorm(size, 1e-5, BF16, offset=offset)
    norm.weight.set_value(drawn(size))
    return norm


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_sum_and_norm(mesh, offset):
    """As written out; on one device bit for bit (on several, XLA rounds elsewhere)."""
    norm, placement, held, added = norm_of(16, offset), Placement(make_mesh(mesh)), drawn(4, 16), drawn(4, 16)
    found = jax.jit(lambda *given: Stream(*given).normed(norm, placement))(held, added)
    total, normed = jax.jit(lambda held, added: (held + added, norm(held + added)))(held, added)
    assert np.array_equal(found.total, total)
    np.testing.assert_allclose(np.asarray(found.normed, np.float32), np.asarray(normed, np.float32), rtol=2**-6 if mesh else 0)
    assert np.array_equal(Stream(held, added).total(placement), total)
    alone = Stream(held)
    assert np.array_equal(alone.normed(norm, placement).total, held) and alone.total(placement) is held


def test_on_several_devices_a_kernel_has_the_tokens_of_each(monkeypatch):
    monkeypatch.setattr(dispatch, "choose", lambda op, *rest: "gpu")
    monkeypatch.setattr(dispatch, "resolve", lambda op, *rest: SimpleNamespace(residual_norm=kernel))
    seen = []

    def kernel(x, added, weight, *, epsilon, offset):
        seen.append((x.shape, added is None, weight.shape))
        return Normed(x, x if added is None else added)

    placement = Placement(make_mesh({"data": 2, "tensor": 2}))
    for added in (drawn(4, 16), None):
        found = Stream(drawn(4, 16), added).normed(norm_of(16, 0.0), placement)
        assert found[0].shape == found[1].shape == (4, 16)
    assert seen == [((2, 16), False, (16,)), ((2, 16), True, (16,))]


def test_layers_hand_on_the_stream_and_taps_are_its_sums():
    placement, norm = Placement(make_mesh({})), norm_of(8, 0.0)
    x = drawn(2, 8)

    def layer(stream, pool, context):
        return LayerResult(Stream(stream.total(placement), jnp.full_like(x, pool[0])), pool + 1)

    def context(*tapped):
        return StepContext(jnp.arange(2, dtype=jnp.int32), Sequences(2), placement, tapped)

    out = through([layer] * 3, x, tuple(jnp.full(1, number) for number in (1, 2, 4)), context(0, 2, 3), norm=norm)
    sums = [x]
    for number in (1, 2, 4):
        sums.append(sums[-1] + jnp.full_like(x, number))
    assert [int(pool[0]) for pool in out.kv] == [2, 3, 5]
    assert np.array_equal(out.features, jnp.concatenate([sums[0], sums[2], sums[3]], axis=1))
    assert np.array_equal(out.hidden, norm(sums[3]))
    assert through([], x, (), context(), norm=norm).features is None
