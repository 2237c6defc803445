import jax.numpy as jnp
import numpy as np

from pallas_kernels.dense_matmul.cases import Case


def test_reference_means_what_it_says():
    case = Case("x", tokens=3, features=10, outputs=7, dtype="float32")
    inputs = case.make(0)
    wanted = np.asarray(inputs["x"], np.float64) @ np.asarray(inputs["weight"], np.float64).T
    np.testing.assert_allclose(case.run(inputs, "reference"), wanted, rtol=1e-4, atol=1e-5)


def test_sums_are_wide():
    """1 + 256 * 0.001 is lost when sums are kept in bfloat16."""
    inputs = {"x": jnp.full((1, 257), 2.0**-10, jnp.bfloat16).at[0, 0].set(1.0), "weight": jnp.ones((1, 257), jnp.bfloat16)}
    assert float(Case("x", 1, 257, 1).run(inputs, "reference")[0, 0]) == 1.25
