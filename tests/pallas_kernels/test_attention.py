import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention
from pallas_kernels.attention import AttentionSpec


def test_spec_is_hashable_and_checked():
    assert hash(AttentionSpec(0.5, window=3)) == hash(AttentionSpec(0.5, window=3))
    for wrong, word in [
        ({"scale": 0.0}, "scale"),
        ({"window": 0}, "window"),
        ({"soft_cap": -1.0}, "soft_cap"),
        ({"rope_scale": 0.0}, "rope_scale"),
    ]:
        with pytest.raises(ValueError, match=f"AttentionSpec.{word}"):
            AttentionSpec(**({"scale": 0.125} | wrong))


@functools.partial(jax.jit, static_argnames="scale")
def rotate(x, positions, rope, scale=1.0):
    return attention.rotate(x, attention.rope_table(positions, rope, scale))


def test_rotation_is_llamas():
    """Feature i of the first half turns with feature i of the second half: complex multiplication by exp(i * angle)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 8), np.float32)
    rope, positions = np.float32([1.0, 0.5, 0.1, 0.01]), np.int32([0, 7, 1000])
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, None, None] * rope.astype(np.float64)) * 1.5
    found = rotate(jnp.asarray(x), jnp.asarray(positions), jnp.asarray(rope), 1.5)
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], -1), atol=2e-4)


def test_rotation_of_a_part_leaves_the_rest():
    x = jnp.ones((2, 1, 8), jnp.bfloat16)
    out = rotate(x, jnp.asarray([1, 2], jnp.int32), jnp.ones(2, jnp.float32))
    assert out.dtype == jnp.bfloat16
    assert jnp.array_equal(out[..., 4:], x[..., 4:])
    assert not jnp.array_equal(out[..., :4], x[..., :4])


def test_scores_depend_on_distance_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 16)), jnp.float32) for _ in range(2))
    rope = jnp.asarray(10.0 ** -np.arange(8), jnp.float32)

    def at(position):
        return jnp.asarray([position], jnp.int32)

    near = jnp.vdot(rotate(q, at(5), rope), rotate(k, at(3), rope))
    far = jnp.vdot(rotate(q, at(105), rope), rotate(k, at(103), rope))
    np.testing.assert_allclose(near, far, rtol=1e-4)


def test_padding_has_no_angle():
    assert not attention.rope_table(jnp.asarray([-1], jnp.int32), jnp.ones(2, jnp.float32), 1.0).any()


def test_float32_is_not_rounded_in_matmuls():
    assert attention.precision(jnp.dtype("float32")) == jax.lax.Precision.HIGHEST
    assert attention.precision(jnp.dtype("bfloat16")) == jax.lax.Precision.DEFAULT


def test_soft_cap():
    raw = jnp.asarray([-1e4, 0.0, 2.0, 1e4], jnp.float32)
    np.testing.assert_allclose(
        attention.shape_scores(raw, AttentionSpec(0.5, soft_cap=3.0)), 3 * np.tanh(np.float32(raw) * 0.5 / 3), rtol=1e-6
    )
    np.testing.assert_array_equal(attention.shape_scores(raw, AttentionSpec(0.5)), np.float32(raw) * 0.5)


@functools.partial(jax.jit, static_argnames="sizes")
def absorbed(scores, values, seen, sizes, sinks=None):
    state = attention.start(jnp.zeros((scores.shape[0], values.shape[1]), jnp.float32), sinks)
    begin = 0
    for size in sizes:
        part = slice(begin, begin + size)
        state = attention.absorb(state, scores[:, part], seen[:, part], lambda weights, part=part: weights @ values[part])
        begin += size
    return state


def test_online_softmax_is_softmax():
    rng = np.random.default_rng(2)
    scores, values = (5 * rng.standard_normal(shape, np.float32) for shape in ((4, 12), (12, 3)))
    seen = rng.random((4, 12)) < 0.6
    seen[2] = False
    masked = np.where(seen, np.float64(scores), -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(masked - masked.max(-1, keepdims=True))
        wanted = np.nan_to_num(weights / weights.sum(-1, keepdims=True)) @ np.float64(values)
    for sizes in ((12,), (5, 5, 2)):
        np.testing.assert_allclose(attention.finish(absorbed(scores, values, seen, sizes)), wanted, atol=2e-6)


def test_a_block_that_is_not_seen_changes_no_bit():
    rng = np.random.default_rng(3)
    scores, values = (rng.standard_normal(shape, np.float32) for shape in ((4, 16), (16, 3)))
    seen = np.ones((4, 16), bool)
    seen[:, 4:12] = False
    short = absorbed(np.delete(scores, slice(4, 12), axis=1), np.delete(values, slice(4, 12), axis=0), np.ones((4, 8), bool), (4, 4))
    long = absorbed(scores, values, seen, (4, 4, 4, 4))
    for a, b in zip(short, long, strict=True):
        assert np.array_equal(a, b)


def test_sinks_take_their_share():
    scores, values = jnp.zeros((1, 3), jnp.float32), jnp.ones((3, 1), jnp.float32)
    state = absorbed(scores, values, jnp.ones((1, 3), bool), (3,), jnp.zeros((1,), jnp.float32))
    np.testing.assert_allclose(attention.finish(state), [[0.75]])


def test_blank_varies_like_its_model():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def grow(x):
        return jax.lax.fori_loop(0, 3, lambda _, total: total + x, attention.blank(x, x.shape, x.dtype))

    out = jax.jit(jax.shard_map(grow, mesh=mesh, in_specs=spec, out_specs=spec))(jnp.arange(4, dtype=jnp.float32))
    np.testing.assert_array_equal(out, 3 * np.arange(4))
