import numpy as np

from pallas_kernels.residual_norm.api import key_of
from pallas_kernels.residual_norm.cases import CASES, Case


def test_shapes():
    for case in CASES:
        inputs = case.make(0)
        assert ("added" in inputs) is (case.added == "given")
        assert inputs["x"].shape == (case.tokens, case.features) and inputs["weight"].shape == (case.features,)
        assert case.tuning_key() == key_of(inputs["x"], inputs.get("added"))


def test_cost_counts_what_goes_in_and_out():
    with_sum, alone = (Case("x", 2, 8, added=added) for added in ("given", "nothing"))
    assert with_sum.cost(with_sum.make(0)).bytes == 2 * (4 * 16 + 8)
    assert alone.cost(alone.make(0)).bytes == 2 * (2 * 16 + 8)


def test_the_same_seed_gives_the_same_data():
    first, again, other = (Case("x", 2, 3).make(seed)["x"] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
