import jax.numpy as jnp
import numpy as np

from pallas_kernels.rounding import round_tokens


def test_tokens_are_rounded_each_by_itself():
    x = jnp.asarray([[1.0, -0.5, 0.25], [0, 0, 0], [1e-45, 0, 0], [254, 127, 1]], jnp.float32)
    tokens = round_tokens(x)
    assert np.array_equal(tokens.values[jnp.asarray([0, 1, 3])], [[127, -64, 32], [0, 0, 0], [127, 64, 0]])
    assert tokens.scales[1, 0] == 1 and tokens.scales[3, 0] == 2 and jnp.isfinite(tokens.scales).all()
    assert np.array_equal(round_tokens(x.astype(jnp.bfloat16)).values[0], tokens.values[0])


def test_what_is_not_finite_is_not_hidden():
    scales = round_tokens(jnp.asarray([[1.0, jnp.nan], [jnp.inf, 1.0], [1.0, 2.0]])).scales
    assert not jnp.isfinite(scales[:2]).any() and jnp.isfinite(scales[2]).all()
