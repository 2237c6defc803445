"""What becomes of one token (the contract test runs it over the cases)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper_token import MOST_INPUTS

one = pytest.importorskip("pallas_kernels.quantized_matmul.gpu_one")
SHAPES = [(24, 1024), (64, 384), (192, 640), (48, 4608)]  # outputs, inputs: with two workers one has fewer tiles of the first


def drawn(outputs, inputs, scale=1.0, seed=0):
    """A token of which outliers are 10^6 times the rest, its largest `scale`; weights of which many are -128; scales of rows."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, inputs)) * 10.0 ** rng.uniform(-3, 3, (1, inputs))
    weight = np.where(rng.random((outputs, inputs)) < 0.1, -128, rng.integers(-128, 128, (outputs, inputs))).astype(np.int8)
    scales = (10.0 ** rng.uniform(-4, -1, (outputs, 1))).astype(np.float32)
    return jnp.asarray(x / np.abs(x).max() * scale, jnp.bfloat16), jnp.asarray(weight), jnp.asarray(scales)


def wide(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def far_off(found, x, weight, scales):
    """The largest error, in what inputs that are off by the documented share of the largest may cause."""
    x, weight, scales = wide(x, weight, scales)
    unit = 2.0**-23 * max(np.abs(x).max(), 2.0**-100)
    return (np.abs(np.asarray(found, np.float64) - x @ (weight * scales).T) / (unit * (np.abs(weight) * scales).sum(axis=1))).max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-20])
def test_against_float64(interpreted, shape, scale):
    x, weight, scales = drawn(*shape, scale)
    found = one.multiply(x, weight, scales, out_dtype=jnp.dtype(jnp.float32))
    assert found.dtype == jnp.float32 and found.shape == (1, shape[0])
    assert far_off(found, x, weight, scales) < 1 and jnp.abs(found).max() > 0
    rounded = one.multiply(x, weight, scales, out_dtype=x.dtype)
    assert rounded.dtype == x.dtype and np.array_equal(rounded, found.astype(x.dtype))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-35, 1e-38, 1e-40])
def test_tiny_tokens_neither_overflow_nor_grow(interpreted, scale):
    x, weight, scales = drawn(64, 384, scale)
    found = one.multiply(x, weight, scales, out_dtype=jnp.dtype(jnp.float32))
    assert far_off(found, x, weight, scales) < 1 and (scale > 0 or not found.any())


def test_the_largest_sums_are_exact(interpreted):
    """All limbs at their largest meet -128; longer tokens have room, too."""
    x, weight, scales = jnp.full((1, 4096), -1.0, jnp.bfloat16), jnp.full((8, 4096), -128, jnp.int8), jnp.ones((8, 1), jnp.float32)
    np.testing.assert_allclose(one.multiply(x, weight, scales, out_dtype=jnp.dtype(jnp.float32)), 4096 * 128, rtol=3e-7)
    assert 128 * 128 * MOST_INPUTS < 2**31


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_token_that_is_not_finite_gives_nan(interpreted, bad):
    x, weight, scales = drawn(64, 128)
    assert jnp.isnan(one.multiply(x.at[0, 77].set(bad), weight, scales, out_dtype=jnp.dtype(jnp.float32))).all()


def test_an_output_depends_on_its_own_row_alone(interpreted):
    """The same bits, too, where a weight is dealt out in other tiles, inside jit or not."""
    x, weight, scales = drawn(96, 1024)
    whole = jax.jit(lambda *given: one.multiply(*given, out_dtype=jnp.dtype(jnp.float32)))(x, weight, scales)
    part = one.multiply(x, weight[8:32], scales[8:32], out_dtype=jnp.dtype(jnp.float32))
    folds = [one.hopper_folds.plan_of([one.Link(1024, rows)], x.dtype, weight.dtype, one.SIZES).folds[0].parts for rows in (96, 24)]
    assert folds[0] != folds[1]
    assert np.array_equal(whole[:, 8:32], part)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"tokens": 2}, False),
        ({"in": 96}, False),
        ({"in": 384, "out": 200}, False),
        ({"in": 1024, "out": 200}, True),
        ({"in": 0}, False),
    ],
)
def test_what_fits(changes, fits):
    key = {"tokens": 1, "in": 4096, "out": 6144, "weight": "int8", "group": 0, "activations": "float", "dtype": "bfloat16"}
    assert one.fits(key | changes) == fits
