import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels.norm import rms_norm
from pallas_kernels.residual_norm.cases import Case


def test_the_package_exports_it():
    assert pallas_kernels.rms_norm is rms_norm


def test_rounding_depends_on_the_offset():
    """Without one the normalised number is rounded before the weight multiplies it."""
    inputs = Case("x", tokens=1, features=64).make(0)
    x, weight = inputs["x"], inputs["weight"]
    scaled = rms_norm(x.astype(jnp.float32), jnp.ones(64), epsilon=0.0, offset=0.0)
    twice, once = (rms_norm(x, weight, epsilon=0.0, offset=offset) for offset in (0.0, 1e-30))
    assert np.array_equal(twice, scaled.astype(x.dtype) * weight[None])
    assert np.array_equal(once, (scaled * weight[None].astype(jnp.float32)).astype(x.dtype))
    assert not np.array_equal(twice, once)


def test_heads_are_normalised_each():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 8), np.float32))
    whole = rms_norm(x, jnp.ones(8), epsilon=1e-6, offset=0.0)
    np.testing.assert_allclose(whole[1, 2:], rms_norm(x[1, 2:], jnp.ones(8), epsilon=1e-6, offset=0.0), rtol=1e-6)
