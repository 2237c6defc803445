"""Tensors written in pieces are read back, in one file or in several."""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest

from jaxinfer.checkpoint.formats.folder import WeightFiles
from jaxinfer.checkpoint.write import Planned, write_files

TENSORS = {
    "a": np.arange(24, dtype=np.int32).reshape(6, 4),
    "b": np.linspace(0, 1, 10).astype(ml_dtypes.bfloat16),
    "c": np.float32(3).reshape(()),
    "d": np.arange(12, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(3, 4),
}


def planned(turned=False):
    def pieces(values):
        yield from ([values[low : low + 2] for low in range(0, len(values), 2)] if values.shape else [values])

    return [Planned(name, it.dtype, it.shape, lambda it=it: pieces(it)) for name, it in TENSORS.items()]


@pytest.mark.parametrize("limit", [1 << 30, 100, 1])
def test_read_back(limit, tmp_path):
    seen = []
    hashes = write_files(tmp_path, planned(), limit=limit, progress=lambda done, total: seen.append((done, total)))
    total = sum(it.nbytes for it in TENSORS.values())
    assert seen[-1] == (total, total) and len(hashes) == len(list(tmp_path.glob("*.safetensors"))) == {1 << 30: 1, 100: 2, 1: 4}[limit]
    with WeightFiles(tmp_path) as files:
        assert list(files.tensors) == list(TENSORS)
        for name, tensor in files.tensors.items():
            found = tensor.read(tuple(slice(0, size) for size in tensor.shape))
            assert found.dtype == TENSORS[name].dtype and found.tobytes() == TENSORS[name].tobytes()
            assert hashes[tensor.file.path.name][name] == hashlib.sha256(found.tobytes()).hexdigest()
            assert tensor.file.entries[name].start % tensor.dtype.itemsize == 0
    if limit < 1 << 30:
        assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"] == {"total_size": total}


def test_pieces_that_are_not_what_was_planned(tmp_path):
    short = Planned("a", np.dtype(np.int8), (3,), lambda: iter([np.zeros(2, np.int8)]))
    with pytest.raises(ValueError, match="a: 3 bytes were planned, 2 came"):
        write_files(tmp_path, [short])
