"""A converted folder holds what quantising at load makes, in either format; a failed conversion leaves nothing."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from jaxinfer.checkpoint import convert as module
from jaxinfer.checkpoint import manifest, read
from jaxinfer.checkpoint.convert import convert
from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.config import ConfigError
from jaxinfer.models.graph import Quantization
from jaxinfer.sharding import make_mesh
from tests.driving import GOLDEN, golden_graph
from tests.weight_files import read_all, write

RULES = ("int8", "w8a8", "int4", "fp8", "int4,layers.0.*=keep,layers.1.mlp.*=w8a8")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("rules", "kind"), [*((rules, "safetensors") for rules in RULES), *((rules, "orbax") for rules in RULES[2:5:2])])
def test_the_same_as_quantised_at_load(rules, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3000)  # several pieces of a matrix
    seen, quantization = [], Quantization.parse(rules)
    made = convert(GOLDEN / "linear", tmp_path / "out", quantization, kind=kind, progress=lambda *done: seen.append(done))
    assert names(tmp_path) == ["out"] and made.bytes_after < made.bytes_before and seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    assert read.of_model(read.read_config(tmp_path / "out")) == read.read_config(GOLDEN / "linear")
    graph, expected_graph = read.as_stored(tmp_path / "out", golden_graph("linear")), golden_graph("linear", "float32", quantization)
    assert graph.specs == expected_graph.specs
    mesh = make_mesh({"tensor": 4})
    found = graph.leaves(read.load(tmp_path / "out", graph, mesh))
    expected = graph.leaves(read.load(GOLDEN / "linear", expected_graph, mesh))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.sharding == other.sharding and np.array_equal(one, other)


def test_other_files_are_carried_over(tmp_path):
    source = shutil.copytree(GOLDEN / "grouped", tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("x")
    (source / "modeling.py").write_text("raise SystemExit")
    (source / "audit.json").write_text("of other weights")
    made = convert(source, tmp_path / "out", Quantization.parse("int8"))
    assert names(tmp_path / "out") == [
        "chat_template.jinja", "config.json", manifest.NAME, "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert made.quantised == 22 and made.carried == 8
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"


def test_factors_change_no_product(tmp_path):
    """Powers of two: the norm times the factors, the matrices divided by them."""
    factors = 2.0 ** np.random.default_rng(0).integers(-3, 4, 64)
    names = {name: factors.astype(np.float32) for name in ("layers.0.mlp_norm.weight", "layers.0.mlp.gate_up.weight")}
    convert(GOLDEN / "linear", tmp_path / "out", Quantization.parse("w8a8,layers.0.mlp.gate_up=keep"), factors=names)
    before, after = read_all(GOLDEN / "linear" / "model.safetensors"), read_all(tmp_path / "out" / "model.safetensors")
    norm, gate = "model.layers.0.post_attention_layernorm.weight", "model.layers.0.mlp.gate_proj.weight"
    assert np.array_equal(after[norm], (before[norm].astype(np.float32) * factors).astype(before[norm].dtype))
    products = [files[gate].astype(np.float32) * files[norm].astype(np.float32) for files in (after, before)]
    assert np.array_equal(*products) and not np.array_equal(after[gate], before[gate])


def test_what_cannot_be_converted(tmp_path):
    int8 = Quantization.parse("int8")
    convert(GOLDEN / "linear", tmp_path / "out", int8)
    with pytest.raises(CheckpointError, match="the weights are quantised already"):
        convert(tmp_path / "out", tmp_path / "again", int8)
    with pytest.raises(CheckpointError, match="it exists already"):
        convert(GOLDEN / "linear", tmp_path / "out", int8)
    source = shutil.copytree(GOLDEN / "linear", tmp_path / "source")
    with pytest.raises(CheckpointError, match="is the model itself; name another folder"):
        convert(source, source, int8, overwrite=True)
    with pytest.raises(ConfigError, match="matches no weight"):
        convert(source, tmp_path / "x", Quantization.parse("int8,nothing=keep"))
    tensors = read_all(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name] * np.float32(np.nan).astype(tensors[name].dtype)
    write(source / "model.safetensors", tensors)
    for kind in ("safetensors", "orbax"):
        with pytest.raises(CheckpointError, match=f"tensor '{name}': a weight that is NaN or infinite"):
            convert(source, tmp_path / "x", int8, kind=kind)
    assert names(tmp_path) == ["out", "source"]


def test_half_a_source_is_not_converted(tmp_path):
    source = shutil.copytree(GOLDEN / "linear", tmp_path / "source")
    os.truncate(source / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="truncated"):
        convert(source, tmp_path / "x", Quantization.parse("int8"))
    assert names(tmp_path) == ["source"] and jax.device_count() == 8
