"""Views give what they stand for, whole and in slices, and read no more than they need."""

import numpy as np
import pytest

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats import views
from tests.quantised_files import opened, pack


class Held:
    """A source in memory that notes what is read."""

    def __init__(self, values):
        self.values, self.read_sizes = values, []
        self.shape, self.dtype = values.shape, values.dtype

    def read(self, index):
        self.read_sizes.append(self.values[index].size)
        return self.values[index]


def same(view, whole):
    assert view.shape == whole.shape
    draw = np.random.default_rng(0)
    for _ in range(12):
        cuts = [sorted(draw.choice(size + 1, 2, replace=False)) for size in whole.shape]
        index = tuple(slice(int(low), int(high)) for low, high in cuts)
        found = view.read(index)
        assert found.dtype == view.dtype and np.array_equal(found, whole[index])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_unpacked(axis, bits):
    whole = np.random.default_rng(1).integers(0, 1 << bits, (21, 13))
    words = Held(pack(whole, bits, axis))
    same(views.Unpacked(words, axis, whole.shape[axis], bits, offset=3), whole - 3)
    words.read_sizes.clear()
    one = [slice(0, 1), slice(0, 1)]
    one[axis] = slice(9, 10)
    views.Unpacked(words, axis, whole.shape[axis], bits).read(tuple(one))
    assert words.read_sizes == [1]


def test_turned_spread_picked_shifted():
    whole = np.arange(12, dtype=np.int8).reshape(4, 3)
    same(views.Transposed(Held(whole)), whole.T)
    same(views.Spread(Held(whole), 0, 3, 11), np.repeat(whole, 3, axis=0)[:11])
    same(views.Spread(Held(whole), 1, 2, 6), np.repeat(whole, 2, axis=1))
    same(views.Picked(Held(whole), (2, 0, 1)), whole[:, [2, 0, 1]])
    same(views.Shifted(Held(whole), -200), whole.astype(np.int16) - 200)
    for shape in ((4,), (4, 1)):
        same(views.Column(Held(whole[:, 0].reshape(shape))), whole[:, :1])
    same(views.Column(Held(np.float32(3).reshape(()))), np.full((1, 1), 3, np.float32))


def test_numbers_are_checked_as_they_are_read(tmp_path):
    tensor = opened(tmp_path, {"x": np.array([[1, 2], [3, 40]], np.int8)})["x"]
    whole = (slice(0, 2), slice(0, 2))
    assert views.Within(tensor, tensor, 0, 40, np.uint8).read(whole).dtype == np.uint8
    assert np.array_equal(views.Within(tensor, tensor, 0, 3).read((slice(0, 2), slice(0, 1))), [[1], [3]])
    with pytest.raises(CheckpointError, match=r"tensor 'x': expected numbers in 0\.\.3, found 40"):
        views.Within(tensor, tensor, 0, 3).read(whole)
    assert views.Scales(tensor, tensor).read(whole).dtype == np.float32
