"""int4 in groups: within half a step, packed low half first, in groups that fit the weight's dimensions."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxinfer.config import ConfigError
from jaxinfer.quant import int4
from jaxinfer.quant.qarray import PACKED, check, dequantize
from jaxinfer.quant.quantise import quantise
from jaxinfer.sharding import ArraySpec


def described(shape, contracting):
    return int4.describe(ArraySpec(shape, np.dtype(np.float32), (None,) * len(shape)), contracting)


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.float32, (2, 96), elements=st.floats(-1e4, 1e4, width=32)))
def test_is_within_half_a_step_of_the_weight(rows):
    weight = quantise(rows, 1, "int4")
    check(weight)
    step = np.repeat(np.asarray(weight.scales, np.float32), weight.blocks[1], axis=1)
    assert (np.abs(np.asarray(dequantize(weight)) - rows) <= step / 2 * (1 + 2**-4)).all()  # scales are rounded to bfloat16


@pytest.mark.parametrize(
    ("shape", "contracting", "blocks"),
    [
        ((8, 384), 1, (1, 128)), ((8, 64), 1, (1, 64)), ((8, 96), 1, (1, 32)), ((8, 4, 2, 64), 3, (1, 1, 2, 64)),
        ((8, 2, 3, 64), 3, (1, 1, 1, 64)), ((2, 5, 256), 1, (1, 1, 128)),
    ],
)  # fmt: skip
def test_groups_fit_the_dimensions(shape, contracting, blocks):
    spec = described(shape, contracting)
    assert (spec.blocks, spec.shape, spec.values.dtype, spec.scales.dtype) == (blocks, shape, PACKED, ml_dtypes.bfloat16)


def test_a_weight_without_groups_is_refused():
    with pytest.raises(ConfigError, match=r"groups of 128, 64, 32 inputs, a weight of shape \(8, 48\) has none; keep it"):
        described((8, 48), 1)


def test_pack():
    assert np.array_equal(int4.pack(np.asarray([[1, 2, 15, 0]], np.uint8)), [[0x21, 0x0F]])


def test_any_piece_of_whole_groups_is_the_same():
    rows = np.random.default_rng(0).normal(size=(4, 128)).astype(np.float32)
    scales = int4.scales(rows, (1, 32))
    whole = int4.values(rows, scales)
    assert np.array_equal(whole[1:3, 16:48], int4.values(rows[1:3, 32:96], scales[1:3, 1:3]))
