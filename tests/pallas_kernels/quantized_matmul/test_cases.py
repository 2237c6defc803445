import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul.cases import CASES, Case
from pallas_kernels.quantized_matmul.formats import Format


def test_shapes():
    for case in CASES:
        inputs = case.make(0)
        assert inputs["x"].shape == (case.tokens, case.features)
        assert inputs["x"].dtype == case.dtype
        known = Format.of(inputs["weight"], inputs["scales"], case.activations)
        assert (known.weight, known.inputs, known.outputs) == (case.weight, case.group, case.rows)
        assert known.key(inputs["x"], inputs["weight"]) == case.tuning_key()
        assert (inputs["zeros"] is not None) == (case.zeros == "given")


def test_the_whole_range_is_drawn():
    inputs = Case("x", tokens=1, features=64, outputs=64).make(0)
    assert (inputs["weight"].min(), inputs["weight"].max()) == (-128, 127)
    values = Case("x", tokens=1, features=64, outputs=64, weight="fp8").make(0)["weight"].astype(jnp.float32)
    assert (values.min(), values.max()) == (-448, 448) and not jnp.isnan(values).any()


def test_the_same_seed_gives_the_same_data():
    first, again, other = (Case("x", 2, 3, 4).make(seed)["x"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_cost_counts_everything_once():
    case = Case("x", tokens=2, features=3, outputs=4)
    assert case.cost(case.make(0)) == (4 * 6 + 12 + 4 * 4 + 4 * 8, 2 * 2 * 3 * 4)
