import jax
import numpy as np
import pytest

from pallas_kernels.token_chain.api import check, key_of
from pallas_kernels.token_chain.cases import CASES, TUNING, Case, Part


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_shapes(case):
    inputs = case.make(0)
    check(**inputs, forms=case.forms, activations=case.activations)
    assert case.tuning_key() == key_of(inputs["x"], inputs["weights"], case.activations)
    assert [weight.values.shape for weight in inputs["weights"]] == list(case.shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), inputs) == jax.tree.map(lambda x: (x.shape, x.dtype), case.described())


def test_an_8b_layer():
    assert TUNING[0].shapes == ((4096, 4096), (28672, 4096), (4096, 14336), (6144, 4096))
    assert [form.gated for form in TUNING[0].forms] == [False, True, False, False]


def test_cost_counts_what_goes_in_and_out():
    case = Case("x", 8, 4, (Part(12, gated=True),), weight="plain")
    assert case.cost(case.make(0)) == (2 * (8 + 4 + 8 * 12 + 6 + 4), 2 * 8 * 12)
    many = Case("x", 8, 4, (Part(12, gated=True),), tokens=3, activations="int8")
    assert many.cost(many.make(0)) == (3 * 2 * (8 + 4) + 8 * 12 + 4 * 12 + 3 * 2 * (6 + 4), 3 * 2 * 8 * 12)


def test_the_same_seed_gives_the_same_data():
    first, again, other = (CASES[0].make(seed)["weights"][0].values for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
