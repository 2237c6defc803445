"""Per-channel int8: as near as rounding allows, from whole rows, whatever the slices."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxinfer.quant import blocks, int8
from jaxinfer.quant.qarray import check
from jaxinfer.quant.quantise import quantise
from jaxinfer.sharding import ArraySpec

FLOATS = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6)), elements=FLOATS), st.integers(1, 2))
def test_is_within_half_a_step_of_the_weight(weight, contracting):
    scales = int8.scales(weight, blocks.rows(weight.shape, contracting))
    values = int8.values(weight, scales)
    assert values.min() >= -127 and (scales > 0).all()
    assert (np.abs(values * scales - weight) <= scales / 2 * (1 + 1e-5)).all()


def test_slices_of_a_row_use_the_whole_rows_scale():
    weight = np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)
    whole = int8.values(weight, int8.scales(weight, (1, 10)))
    assert np.array_equal(whole[2:4, 5:], int8.values(weight[2:4, 5:], int8.scales(weight[2:4], (1, 10))))


def test_rows_of_zeros_tiny_numbers_and_half_precision():
    rows = np.asarray([[0, 0], [1e-44, -1e-44], [3.0, -1.5]], np.float32)
    weight = quantise(rows, 1, "int8")
    check(weight)
    assert weight.scales[0] == 1.0 and not np.asarray(weight.values)[0].any()
    check(quantise(rows.astype(ml_dtypes.bfloat16), 1, "int8"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        int8.scales(np.asarray([[1.0, bad]], np.float32), (1, 2))


def test_describe_keeps_the_logical_axes():
    spec = int8.describe(ArraySpec((64, 2, 4, 16), np.dtype(np.float32), ("embed", "kv_heads", None, None)), 3)
    assert spec.values == ArraySpec((64, 2, 4, 16), np.dtype(np.int8), ("embed", "kv_heads", None, None))
    assert spec.scales == ArraySpec((64, 1, 1, 1), np.dtype(np.float32), ("embed", None, None, None))
    assert spec.scheme == "int8"
