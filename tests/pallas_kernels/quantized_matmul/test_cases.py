import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul.cases import CASES, Case


def test_shapes():
    for case in CASES:
        inputs = case.make(0)
        assert inputs["x"].shape == (case.tokens, case.features)
        assert inputs["x"].dtype == case.dtype
        assert inputs["weight"].shape == (case.outputs, case.features)
        assert inputs["weight"].dtype == jnp.int8
        assert inputs["scales"].shape == (case.outputs,)
        assert case.tuning_key()["out"] == case.outputs


def test_the_whole_range_is_drawn():
    inputs = Case("x", tokens=1, features=64, outputs=64).make(0)
    assert (inputs["weight"].min(), inputs["weight"].max()) == (-128, 127)


def test_the_same_seed_gives_the_same_data():
    first, again, other = (Case("x", 2, 3, 4).make(seed)["x"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_cost_counts_everything_once():
    case = Case("x", tokens=2, features=3, outputs=4)
    assert case.cost(case.make(0)) == (4 * 6 + 12 + 4 * 4 + 4 * 8, 2 * 2 * 3 * 4)
