import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rounding import round_tokens


def test_tokens_are_rounded_each_by_itself():
    x = jnp.asarray([[1.0, -0.5, 0.25], [0, 0, 0], [1e-45, 0, 0], [254, 127, 1]], jnp.float32)
    tokens = round_tokens(x)
    assert np.array_equal(tokens.values[jnp.asarray([0, 1, 3])], [[127, -64, 32], [0, 0, 0], [127, 64, 0]])
    assert tokens.scales[1, 0] == 1 and tokens.scales[3, 0] == 2 and jnp.isfinite(tokens.scales).all()
    assert np.array_equal(round_tokens(x.astype(jnp.bfloat16)).values[0], tokens.values[0])


@pytest.mark.parametrize("tokens", [3, 70])
@pytest.mark.parametrize("width", [2, 256])
def test_what_is_not_finite_is_not_hidden(tokens, width):
    """A CPU takes the largest of many tokens without those that are no numbers."""
    x = jnp.ones((tokens, width)).at[0, 1].set(jnp.nan).at[1, 0].set(jnp.inf)
    for found in (round_tokens(x), jax.jit(round_tokens)(x), round_tokens(jnp.full((tokens, width), jnp.nan).at[2:].set(1.0))):
        assert not jnp.isfinite(found.scales[:2]).any() and jnp.isfinite(found.scales[2:]).all()
