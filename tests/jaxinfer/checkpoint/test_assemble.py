"""Pieces are made once and come together on every mesh."""

import numpy as np

from jaxinfer.checkpoint.assemble import Kept, assemble
from jaxinfer.sharding import DEFAULT_RULES, ArraySpec, make_mesh, named


def test_devices_with_the_same_piece_share_it():
    whole, made = np.arange(32, dtype=np.float32).reshape(8, 4), []

    def make(index):
        made.append(index)
        return whole[index]

    spec = ArraySpec((8, 4), np.dtype(np.float32), ("mlp", None))
    for mesh, pieces in ((make_mesh({}), 1), (make_mesh({"data": 2, "tensor": 4}), 4)):
        made.clear()
        array = assemble(spec, mesh, DEFAULT_RULES, Kept(make).get)
        assert np.array_equal(array, whole) and array.sharding == named(spec, mesh) and len(made) == pieces
        assert all(type(part.start) is int and type(part.stop) is int for index in made for part in index)
