"""Whatever changes in a folder is found and named."""

import json

import numpy as np
import pytest

from jaxinfer.checkpoint import manifest
from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.write import Planned, write_files

VALUES = {name: np.arange(size, dtype=np.float32) for name, size in {"a.weight": 100, "b.weight": 50}.items()}


@pytest.fixture
def folder(tmp_path):
    planned = [Planned(name, it.dtype, it.shape, lambda it=it: iter([it])) for name, it in VALUES.items()]
    hashes = write_files(tmp_path, planned)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("to be read by people")
    (tmp_path / "audit.json").write_text("to be written again")
    (tmp_path / "orbax" / "00000").mkdir(parents=True)
    (tmp_path / "orbax" / "00000" / "data").write_bytes(b"12345")
    manifest.write(tmp_path, hashes)
    return tmp_path


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(bytes(data))


def test_a_whole_folder_passes(folder):
    seen = []
    manifest.verify(folder, weights=True, progress=lambda done, total: seen.append((done, total)))
    manifest.verify(folder, weights=False)
    total = (folder / "model.safetensors").stat().st_size + 5
    assert seen[-1] == (total, total) and len(seen) == 2
    manifest.require(folder)
    assert set(json.loads((folder / manifest.NAME).read_text())["files"]) == {"config.json", "model.safetensors", "orbax/00000/data"}


def test_without_a_manifest_nothing_is_checked_or_nothing_is_read(folder):
    (folder / manifest.NAME).unlink()
    flip(folder / "model.safetensors", -1)
    manifest.verify(folder, weights=True)
    with pytest.raises(CheckpointError, match=r"jaxinfer_manifest\.json: expected the hashes of this Orbax checkpoint, found no such file"):
        manifest.require(folder)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model.safetensors", lambda path: flip(path, -10), "model.safetensors: tensor 'b.weight': expected SHA-256 "),
        ("model.safetensors", lambda path: flip(path, -300), "model.safetensors: tensor 'a.weight': expected SHA-256 "),
        ("model.safetensors", lambda path: flip(path, 60), "model.safetensors: "),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1]), "model.safetensors: expected "),
        ("model.safetensors", lambda path: path.unlink(), "found no such file"),
        ("orbax/00000/data", lambda path: flip(path, 2), "data: expected SHA-256 "),
        ("config.json", lambda path: path.write_text("[]"), "config.json: expected SHA-256 "),
        (manifest.NAME, lambda path: flip(path, 30), "jaxinfer_manifest.json: expected "),
        (manifest.NAME, lambda path: path.write_text("{}"), "expected its own SHA-256 at the end"),
    ],
)
def test_what_changed_is_named(name, change, words, folder):
    change(folder / name)
    with pytest.raises(CheckpointError) as error:
        for weights in (False, True):
            manifest.verify(folder, weights=weights)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_every_bit_of_the_manifest_that_means_something_is_guarded(folder):
    whole = (folder / manifest.NAME).read_bytes()
    silent = []
    for at in range(0, len(whole), 29):
        flip(folder / manifest.NAME, at)
        try:
            manifest.verify(folder, weights=True)
            silent.append(chr(whole[at]))
        except CheckpointError:
            pass
        (folder / manifest.NAME).write_bytes(whole)
    assert set(silent) <= {" ", "\n"}


def test_names_outside_of_the_folder_and_other_versions(folder):
    outside, files = {"../x": {"bytes": 1, "sha256": ""}}, {"x": 3}
    for body in ({"version": 1, "files": outside}, {"version": 2, "files": {}}, {"version": 1, "files": files}):
        (folder / manifest.NAME).write_text(json.dumps(body | {"sha256": manifest._own(body)}))
        with pytest.raises(CheckpointError, match=r"names of files in the folder|version 1 and files|bytes and sha256 of each file"):
            manifest.verify(folder, weights=True)
