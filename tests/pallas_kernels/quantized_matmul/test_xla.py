import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import xla
from pallas_kernels.quantized_matmul.cases import Case


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_token_depends_on_itself_alone(tokens):
    inputs = Case("x", tokens=tokens, features=64, outputs=48).make(0)
    run = jax.jit(xla.quantized_matmul)
    first = run(**inputs)
    other = run(**(inputs | {"x": inputs["x"].at[1:].set(7.0)}))
    assert np.array_equal(first[0], other[0])


def test_sums_are_wide():
    """1 + 256 * 0.001 is lost when sums are kept in bfloat16."""
    x = jnp.full((1, 257), 2.0**-10, jnp.bfloat16).at[0, 0].set(1.0)
    out = jax.jit(xla.quantized_matmul)(x, jnp.ones((1, 257), jnp.int8), jnp.ones(1, jnp.float32))
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0]) == 1.25
