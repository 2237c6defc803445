"""The files of a folder: one or several, an index that is not trusted, nothing else touched."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats.folder import INDEX, SINGLE, WeightFiles
from tests.weight_files import write

ONE, TWO = {"a": np.ones(3, np.float32)}, {"b": np.zeros((2, 2), np.float16)}


def sharded(folder, weight_map=None):
    write(folder / "x1.safetensors", ONE)
    write(folder / "x2.safetensors", TWO)
    index = {
        "metadata": {"total_size": 20},
        "weight_map": {"a": "x1.safetensors", "b": "x2.safetensors"} if weight_map is None else weight_map,
    }
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def test_one_file(tmp_path):
    write(tmp_path / SINGLE, ONE)
    with WeightFiles(tmp_path) as files:
        assert list(files.tensors) == ["a"]
    assert all(file.descriptor < 0 for file in files.files)


def test_several_files_through_links(tmp_path):
    """Downloads are folders of links into a store: links are followed, the names in the index are what must be plain."""
    store, folder = tmp_path / "store", tmp_path / "snapshot"
    store.mkdir()
    folder.mkdir()
    for file in sharded(store).iterdir():
        (folder / file.name).symlink_to(file)
    with WeightFiles(folder) as files:
        assert {name: tensor.shape for name, tensor in files.tensors.items()} == {"a": (3,), "b": (2, 2)}


@pytest.mark.parametrize(
    "name",
    [
        "../x1.safetensors",
        "/etc/passwd",
        "sub/x1.safetensors",
        "..\\x1.safetensors",
        ".x.safetensors",
        "x1.bin",
        "c:x.safetensors",
        "x\0.safetensors",
        3,
        None,
        ["x1.safetensors"],
    ],
)
def test_names_that_leave_the_folder_are_refused(name, tmp_path):
    sharded(tmp_path, {"a": name, "b": "x2.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor 'a': expected a plain \*\.safetensors name inside the folder, found"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "x1.safetensors", "b": "x1.safetensors"}, "tensor 'b': expected the tensor that the index places in this file"),
        ({"a": "x1.safetensors", "b": "x2.safetensors", "c": "x2.safetensors"}, "tensor 'c': expected the tensor"),
        ({"a": "x1.safetensors", "b": "x3.safetensors"}, "x3.safetensors: expected a readable safetensors file"),
        ({}, "expected weight_map"),
        ([], "expected weight_map"),
        ("x1.safetensors", "expected weight_map"),
    ],
)
def test_an_index_that_does_not_fit_the_files(weight_map, words, tmp_path):
    with pytest.raises(CheckpointError) as error:
        WeightFiles(sharded(tmp_path, weight_map))
    assert words in str(error.value)


def test_a_tensor_in_two_files(tmp_path):
    sharded(tmp_path)
    write(tmp_path / "x2.safetensors", {**TWO, **ONE})
    with pytest.raises(CheckpointError, match=r"x2.safetensors: tensor 'a': expected only tensors that the index places in this file"):
        WeightFiles(tmp_path)


def test_a_tensor_twice_in_the_index(tmp_path):
    sharded(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "x1.safetensors", "a": "x2.safetensors"}}')
    with pytest.raises(CheckpointError, match="the name 'a' stands twice"):
        WeightFiles(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"expected model\.safetensors or model\.safetensors\.index\.json, found neither; it holds nothing"
    ):
        WeightFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, which can run code: convert it"):
        WeightFiles(tmp_path)
    with pytest.raises(CheckpointError, match="expected a model folder, found none"):
        WeightFiles(tmp_path / "absent")


def open_files():
    """How many files this process has open, where the system says it."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_files_are_closed_when_one_is_broken(tmp_path):
    sharded(tmp_path)
    (tmp_path / "x2.safetensors").write_bytes(b"broken")
    before = open_files()
    with pytest.raises(CheckpointError):
        WeightFiles(tmp_path)
    assert open_files() == before


def test_a_file_by_another_name_is_no_guess(tmp_path):
    (tmp_path / "gptq_model-4bit-32g.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"if gptq_model-4bit-32g\.safetensors holds all .* rename it to model\.safetensors$"):
        WeightFiles(tmp_path)
