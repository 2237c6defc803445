import numpy as np

from pallas_kernels.dense_matmul.cases import CASES, Case


def test_shapes():
    for case in CASES:
        inputs = case.make(0)
        assert inputs["x"].shape == (case.tokens, case.features) and inputs["weight"].shape == (case.outputs, case.features)
        assert inputs["x"].dtype == inputs["weight"].dtype == case.dtype
        assert case.tuning_key()["out"] == case.outputs


def test_the_same_seed_gives_the_same_data():
    first, again, other = (Case("x", 2, 3, 4).make(seed)["x"] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
