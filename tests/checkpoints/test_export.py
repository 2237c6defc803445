"""Exported files read back bit for bit, and wrong tensors are named."""

import json
from pathlib import Path

import numpy as np
import pytest

from checkpoints import export
from checkpoints.export import BFLOAT16, Shape

TINY = Shape(64, 16, 32, 2, 2, 1, 8, 64)


def weights(shape: Shape) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=size).astype(np.float32) for name, size in export.tensor_shapes(shape).items()}


def test_files_are_small_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export, "FILE_BYTES", 4000)
    tensors = weights(TINY)
    export.write_checkpoint(tmp_path, TINY, tensors)
    again = export.read_checkpoint(tmp_path)
    assert list(again) == list(export.tensor_shapes(TINY))
    assert all(np.array_equal(again[name], array.astype(BFLOAT16)) for name, array in tensors.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * export.parameter_count(TINY)
    assert len(set(index["weight_map"].values())) == len(list(tmp_path.glob("*.safetensors"))) > 1


def test_wrong_tensors_are_named(tmp_path: Path):
    tensors = weights(TINY)
    tensors["model.norm.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*\(16,\), \(3,\)"):
        export.write_checkpoint(tmp_path, TINY, tensors)
    with pytest.raises(TypeError, match="x: expected bfloat16, found float32"):
        export.write_safetensors(tmp_path / "x.safetensors", {"x": np.zeros(2, np.float32)})


def test_a_cut_file_is_refused(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    export.write_safetensors(path, {"x": np.zeros(8, BFLOAT16)})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"x\.safetensors: x: expected BF16"):
        export.read_safetensors(path)


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="not a multiple"):
        Shape(num_attention_heads=6, num_key_value_heads=4)
    with pytest.raises(ValueError, match="odd"):
        Shape(head_dim=63)
