import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul.cases import Case


def test_reference_means_what_it_says():
    case = Case("x", tokens=3, features=10, outputs=7)
    inputs = case.make(0)
    x, weight, scales = (np.asarray(inputs[name], np.float64) for name in ("x", "weight", "scales"))
    wanted = np.einsum("ti,oi,o->to", x, weight, scales)
    np.testing.assert_allclose(case.run(inputs, "reference"), wanted, rtol=1e-4, atol=1e-4)


def test_sums_are_wide():
    """1 + 256 * 0.001 is lost when sums are kept in bfloat16."""
    case = Case("x", tokens=1, features=257, outputs=1, dtype="bfloat16")
    x = jnp.full((1, 257), 2.0**-10, jnp.bfloat16).at[0, 0].set(1.0)
    inputs = {"x": x, "weight": jnp.ones((1, 257), jnp.int8), "scales": jnp.ones(1, jnp.float32)}
    assert float(case.run(inputs, "reference")[0, 0]) == 1.25
