import numpy as np

from pallas_kernels.grouped_matmul import api
from pallas_kernels.grouped_matmul.cases import CASES, Case


def test_shapes():
    for case in CASES:
        inputs = case.make(1)
        assert api.key(inputs["x"], inputs["weight"]) == case.tuning_key()
        assert (inputs["scales"] is None) == (case.weight == "float")
        assert inputs["sizes"].sum() == case.rows if case.rests == "none" else inputs["sizes"].sum() <= case.rows


def test_groups_are_sometimes_empty_and_sometimes_all_are():
    case = Case("x", rows=9, groups=4, features=8, outputs=8, rests="some")
    sizes = np.stack([case.make(seed)["sizes"] for seed in range(10)])
    assert (sizes.sum(axis=1) == 0).any() and (sizes == 0).any(axis=1).sum() > 5 and (sizes.sum(axis=1) > 3).any()


def test_cost_counts_weights_of_groups_with_rows():
    case = Case("x", rows=3, groups=4, features=8, outputs=2)
    inputs = case.make(0) | {"sizes": np.array([2, 0, 0, 1], np.int32)}
    assert case.cost(inputs) == (2 * 2 * 8 * 4 + 4 * 4 + 3 * (8 + 2) * 4, 2 * 3 * 8 * 2)
