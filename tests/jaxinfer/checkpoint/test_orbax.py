"""Orbax checkpoints: nothing is read that the manifest does not vouch for, nothing loads that is not the graph's."""

import json

import jax
import numpy as np
import pytest

from jaxinfer.checkpoint import manifest, orbax, read
from jaxinfer.checkpoint.convert import convert
from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.models.graph import Quantization
from jaxinfer.sharding import make_mesh
from tests.driving import GOLDEN, golden_graph


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "PART_BYTES", 60_000)
    convert(GOLDEN / "linear", tmp_path / "model", Quantization.parse("int8"), kind="orbax")
    return tmp_path / "model"


def load(folder, graph=None):
    graph = graph or read.as_stored(folder, golden_graph("linear", "bfloat16"))
    return read.load(folder, graph, make_mesh({}))


def test_parts_are_read_one_after_another(folder):
    parts = sorted(path.name for path in (folder / "orbax").iterdir())
    assert len(parts) >= 2 and parts[0] == "00000"
    seen, graph = [], read.as_stored(folder, golden_graph("linear", "bfloat16"))
    read.verify(folder, graph)
    weights = read.load(folder, graph, make_mesh({}), progress=lambda *done: seen.append(done))
    assert list(weights) == list(graph.names) and seen[-1] == (graph.nbytes, graph.nbytes)
    expected = read.load(GOLDEN / "linear", golden_graph("linear", "bfloat16", Quantization.parse("int8")), make_mesh({}))
    assert all(np.array_equal(*both) for both in zip(jax.tree.leaves(weights), jax.tree.leaves(expected), strict=True))


def test_every_flipped_bit_is_found(folder):
    files = [path for path in (folder / "orbax").rglob("*") if path.is_file() and path.stat().st_size]
    largest = max(files, key=lambda path: path.stat().st_size)
    for path in (largest, files[0], files[-1]):
        whole = path.read_bytes()
        path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        with pytest.raises(CheckpointError, match=rf"{path.name}: expected SHA-256 .*, as jaxinfer_manifest\.json says"):
            load(folder)
        path.write_bytes(whole)
    (folder / manifest.NAME).unlink()
    with pytest.raises(CheckpointError, match="expected the hashes of this Orbax checkpoint"):
        load(folder)


def vouch(folder):
    """A manifest for the folder as it is now."""
    (folder / manifest.NAME).unlink()
    manifest.write(folder)


def test_arrays_of_another_model(folder):
    other = golden_graph("grouped", "bfloat16", Quantization.parse("int8"))
    with pytest.raises(CheckpointError, match=r"tensor 'layers.*': expected shape .* as config\.json asks for"):
        load(folder, other)
    config = json.loads((folder / "config.json").read_text())
    for scheme, words in (("w8a8,layers.0.*=keep", "expected array as config.json asks for, found scales and values"), ("fp8", "and int8")):
        config["quantization_config"]["scheme"] = scheme
        (folder / "config.json").write_text(json.dumps(config))
        vouch(folder)
        with pytest.raises(CheckpointError, match=words):
            load(folder)


def test_a_config_that_says_other_things(folder):
    config = json.loads((folder / "config.json").read_text())
    for change, words in (({"version": 2}, "version = 1, found 2"), ({"scheme": 8}, "scheme, such as 'int8'"), ({"x": 1}, "found x = 1")):
        changed = config | {"quantization_config": config["quantization_config"] | change}
        with pytest.raises(CheckpointError) as error:
            orbax.quantization(changed, folder / "config.json")
        assert words in str(error.value)


def test_parts_that_are_missing_or_broken(folder):
    last = max((folder / "orbax").iterdir())
    (last / "_METADATA").write_text("{")
    vouch(folder)
    with pytest.raises(CheckpointError, match=rf"{last.name}: expected an Orbax checkpoint, found"):
        load(folder)
    for path in sorted(last.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    last.rmdir()
    vouch(folder)
    with pytest.raises(CheckpointError, match="found no such weight"):
        load(folder)
