"""Blocks of a weight: which boxes are runs of merged dimensions, the largest in each, and the way back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.quant import blocks


def test_rows_are_one_block_for_each_output():
    assert blocks.rows((2, 48, 4, 8), 2) == (1, 1, 4, 8)


@pytest.mark.parametrize(
    ("shape", "length", "found"),
    [
        ((4, 2, 64), 128, (1, 2, 64)), ((4, 2, 64), 32, (1, 1, 32)), ((4, 2, 64), 512, (4, 2, 64)), ((896,), 128, (128,)),
        ((3, 64), 128, None), ((48,), 32, None), ((2, 64), 256, None),
    ],
)  # fmt: skip
def test_a_run_is_a_box_or_nothing(shape, length, found):
    assert blocks.run(shape, length) == found


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 24))
def test_a_run_covers_what_follows_each_other(shape, length):
    box = blocks.run(shape, length)
    if box is not None:
        numbers = np.arange(np.prod(shape)).reshape(shape)
        per_block = numbers[tuple(slice(None, None, step) for step in box)]  # the first of each block
        assert np.array_equal(blocks.spread(per_block, shape).ravel(), numbers.ravel() // length * length)


def test_largest_and_spread():
    piece = np.asarray([[1, -4, 2, 0], [3, 0, -1, 5]], np.float32)
    top = blocks.largest(piece, (2, 2))
    assert np.array_equal(top, [[4, 5]])
    assert np.array_equal(blocks.spread(top, (2, 4)), [[4, 4, 5, 5]] * 2)
    with pytest.raises(ValueError, match="whole number of blocks"):
        blocks.largest(piece, (1, 3))


def test_steps_bring_the_largest_to_the_limit():
    assert np.array_equal(blocks.steps(np.asarray([0.0, 254.0], np.float32), 127), [1, 2])
    assert blocks.steps(np.asarray([1e-44], np.float32), 127)[0] > 0
