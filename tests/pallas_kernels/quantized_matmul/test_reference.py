import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul.cases import Case


def test_reference_means_what_it_says():
    case = Case("x", tokens=3, features=10, outputs=7)
    inputs = case.make(0)
    x, weight, scales = (np.asarray(inputs[name], np.float64) for name in ("x", "weight", "scales"))
    wanted = np.einsum("ti,oi,o->to", x, weight, scales[:, 0])
    np.testing.assert_allclose(case.run(inputs, "reference"), wanted, rtol=1e-4, atol=1e-4)


def test_sums_are_wide():
    """1 + 256 * 0.001 is lost when sums are kept in bfloat16."""
    case = Case("x", tokens=1, features=257, outputs=1, dtype="bfloat16")
    x = jnp.full((1, 257), 2.0**-10, jnp.bfloat16).at[0, 0].set(1.0)
    inputs = {"x": x, "weight": jnp.ones((1, 257), jnp.int8), "scales": jnp.ones((1, 1), jnp.float32)}
    assert float(case.run(inputs, "reference")[0, 0]) == 1.25


def test_halves_of_bytes_blocks_and_zeros():
    case = Case("x", tokens=2, features=8, outputs=6, weight="int4", group=4, rows=2, zeros="given")
    inputs = {name: np.asarray(value) for name, value in case.make(0).items()}
    wanted = np.zeros((2, 6))
    for row in range(6):
        for column in range(8):
            value = inputs["weight"][row, column // 2] >> (4 * (column % 2)) & 15
            block = row // 2, column // 4
            wanted[:, row] += inputs["x"][:, column] * (float(value) - float(inputs["zeros"][block])) * inputs["scales"][block]
    np.testing.assert_allclose(case.run(case.make(0), "reference"), wanted, rtol=1e-4, atol=1e-5)


def test_activations_are_rounded_first():
    case = Case("x", tokens=3, features=10, outputs=7, activations="int8")
    inputs = case.make(0)
    x, weight, scales = (np.asarray(inputs[name], np.float64) for name in ("x", "weight", "scales"))
    steps = np.abs(x).max(1, keepdims=True) / 127
    wanted = np.einsum("ti,oi,o->to", np.rint(x / steps) * steps, weight, scales[:, 0])
    np.testing.assert_allclose(case.run(inputs, "reference"), wanted, rtol=1e-4, atol=1e-4)
