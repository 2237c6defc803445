import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.residual_norm import reference
from pallas_kernels.residual_norm.cases import Case


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-7), ("float16", 2**-10)])
def test_reference_means_what_it_says(dtype, tolerance, offset):
    case = Case("x", tokens=3, features=40, dtype=dtype, offset=offset)
    inputs = case.make(0)
    found = case.run(inputs, "reference")
    assert np.array_equal(found.total, inputs["x"] + inputs["added"])
    total, weight = np.asarray(found.total, np.float64), np.asarray(inputs["weight"], np.float64)
    wanted = total / np.sqrt(np.mean(total**2, axis=1, keepdims=True) + case.epsilon) * (weight + offset)
    np.testing.assert_allclose(np.asarray(found.normed, np.float64), wanted, rtol=tolerance, atol=1e-6)


def test_squares_are_summed_wide_and_of_what_was_rounded():
    """1 + 2**-9 is 1 in bfloat16; 256 squares of 300 are more than float16 holds."""
    ones = jnp.ones((1, 256), jnp.bfloat16)
    assert np.array_equal(reference.residual_norm(ones, ones * 2**-9, ones[0], epsilon=0.0).normed, ones)
    large = jnp.full((1, 256), 300, jnp.float16)
    assert np.array_equal(reference.rms_norm(large, large[0], epsilon=0.0, offset=0.0), large)


def test_rounding_depends_on_the_offset():
    """Without one the normalised number is rounded before the weight multiplies it."""
    inputs = Case("x", tokens=1, features=64).make(0)
    x, weight = inputs["x"], inputs["weight"]
    scaled = reference.rms_norm(x.astype(jnp.float32), jnp.ones(64), epsilon=0.0, offset=0.0)
    twice, once = (reference.rms_norm(x, weight, epsilon=0.0, offset=offset) for offset in (0.0, 1e-30))
    assert np.array_equal(twice, scaled.astype(x.dtype) * weight[None])
    assert np.array_equal(once, (scaled * weight[None].astype(jnp.float32)).astype(x.dtype))
    assert not np.array_equal(twice, once)


def test_heads_are_normalised_each():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 8), np.float32))
    whole = reference.rms_norm(x, jnp.ones(8), epsilon=1e-6, offset=0.0)
    np.testing.assert_allclose(whole[1, 2:], reference.rms_norm(x[1, 2:], jnp.ones(8), epsilon=1e-6, offset=0.0), rtol=1e-6)
