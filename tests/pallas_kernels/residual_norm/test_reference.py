import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.norm import rms_norm
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
    assert np.array_equal(rms_norm(large, large[0], epsilon=0.0, offset=0.0), large)
