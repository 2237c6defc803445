"""float8 weights: as near as three bits of mantissa allow, never NaN, in any blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxinfer.quant import fp8
from jaxinfer.quant.qarray import FP8, check, dequantize, describe
from jaxinfer.quant.quantise import quantise, quantise_as
from jaxinfer.sharding import ArraySpec


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.float32, (3, 8), elements=st.floats(-1e4, 1e4, width=32)))
def test_is_within_half_a_step_of_the_weight(rows):
    weight = quantise(rows, 1, "fp8")
    check(weight)
    scales = np.asarray(weight.scales)
    smallest = np.finfo(np.float32).tiny  # what lies below it is zero to XLA
    assert (np.abs(np.asarray(dequantize(weight)) - rows) <= np.maximum(np.abs(rows) / 16, scales * 2.0**-10) * (1 + 1e-5) + smallest).all()


@pytest.mark.parametrize("blocks", [(4, 8), (2, 4), (1, 8)])
def test_one_scale_for_the_tensor_a_tile_or_a_row(blocks):
    weight = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    spec = describe(ArraySpec((4, 8), np.dtype(np.float32), (None, None)), 1, blocks, FP8, scheme="fp8")
    found = quantise_as(weight, spec)
    assert found.blocks == blocks and float(np.abs(np.asarray(found.values, np.float32)).max()) == fp8.LIMIT
    assert np.allclose(dequantize(found), weight, rtol=1 / 16, atol=1e-4)


def test_the_largest_is_exact():
    weight = np.asarray([[448.0, -0.5, 0.0]], np.float32)
    assert np.array_equal(fp8.values(weight, fp8.scales(weight, (1, 3))).astype(np.float32), weight)
