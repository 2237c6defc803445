"""Checkpoints become arrays on a mesh: exact, sharded, quantised; and whatever does not fit is one clear error."""

import json
import os
import shutil
import threading

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxinfer.checkpoint import read
from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats import safetensors
from jaxinfer.models.graph import Quantization
from jaxinfer.quant.find import schemes
from jaxinfer.quant.qarray import QArray, check
from jaxinfer.quant.quantise import quantise
from jaxinfer.sharding import make_mesh, named
from tests.driving import GOLDEN, golden_graph
from tests.weight_files import read_all, write

DOWN, GATE, UP = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "gate", "up"))
HEADS = {"grouped": (8, 2, 8), "linear": (8, 4, 8)}


def stored(name):
    """All tensors of a golden model."""
    return {key: values for file in sorted((GOLDEN / name).glob("*.safetensors")) for key, values in read_all(file).items()}


@pytest.fixture
def copy(tmp_path):
    """A golden folder to break."""

    def make(name="linear"):
        return shutil.copytree(GOLDEN / name, tmp_path / name)

    return make


def rewrite(folder, change):
    """Change the tensors of a folder that has one file."""
    tensors = stored(folder.name)
    change(tensors)
    write(folder / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "tensor": 4}], ids=str)
@pytest.mark.parametrize("name", ["grouped", "linear"])
def test_every_weight_is_where_and_what_it_should_be(name, mesh):
    graph, mesh, file = golden_graph(name), make_mesh(mesh), stored(name)
    weights = read.load(GOLDEN / name, graph, mesh)
    assert list(weights) == list(graph.names)
    for key, spec in zip(graph.names, graph.specs, strict=True):
        assert weights[key].sharding == named(spec, mesh) and weights[key].dtype == np.float32
    heads, kv_heads, dim = HEADS[name]
    q, k, v = (file[f"model.layers.1.self_attn.{part}_proj.weight"].astype(np.float32).reshape(kv_heads, -1, dim, 64) for part in "qkv")
    assert np.array_equal(weights["layers.1.attention.qkv.weight"], np.concatenate([q, k, v], axis=1))
    out = file["model.layers.1.self_attn.o_proj.weight"].astype(np.float32)
    assert np.array_equal(weights["layers.1.attention.out.weight"], out.reshape(64, kv_heads, heads // kv_heads, dim))
    assert np.array_equal(weights["layers.0.mlp.gate_up.weight"], np.stack([file[GATE], file[UP]]).astype(np.float32))
    assert np.array_equal(weights["embedding.weight"], file["model.embed_tokens.weight"].astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float64])
def test_every_floating_dtype_is_cast(dtype, copy):
    folder = rewrite(copy(), lambda tensors: tensors.update({DOWN: tensors[DOWN].astype(dtype)}))
    expected = stored("linear")[DOWN].astype(dtype)
    for wanted in ("float32", "bfloat16"):
        down = read.load(folder, golden_graph("linear", wanted), make_mesh({}))["layers.0.mlp.down.weight"]
        assert down.dtype == wanted and np.array_equal(down, expected.astype(wanted))


def test_a_device_reads_its_share_and_no_more(monkeypatch):
    """Sharded over 4: what is read in all is the model once, as replicated weights are read once and shared."""
    monkeypatch.setattr(safetensors, "SHORTEST_RUN", 0)
    counted, preadv, lock = [], os.preadv, threading.Lock()

    def counting(descriptor, buffers, offset):
        with lock:
            counted.append(preadv(descriptor, buffers, offset))
        return counted[-1]

    monkeypatch.setattr(os, "preadv", counting)
    graph = golden_graph("linear")
    read.load(GOLDEN / "linear", graph, make_mesh({"tensor": 4}))
    assert sum(counted) == graph.nbytes


def test_progress_ends_at_the_whole():
    seen = []
    graph = golden_graph("grouped")
    read.load(GOLDEN / "grouped", graph, make_mesh({}), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (graph.nbytes, graph.nbytes) and len(seen) == len(graph.names)


@pytest.mark.parametrize("mesh", [{}, {"tensor": 4}], ids=str)
@pytest.mark.parametrize("block", [1, 1 << 26])
@pytest.mark.parametrize("scheme", schemes())
def test_quantised_at_load_it_is_the_same_on_every_mesh(mesh, block, scheme, monkeypatch):
    monkeypatch.setattr(read, "ROWS_BLOCK", block)
    graph, mesh, file = golden_graph("linear", "bfloat16", Quantization(scheme)), make_mesh(mesh), stored("linear")
    weights = read.load(GOLDEN / "linear", graph, mesh)
    down = weights["layers.0.mlp.down.weight"]  # its rows are cut by the mesh
    assert isinstance(down, QArray)
    check(down)
    whole = quantise(file[DOWN], 1, scheme)
    assert np.array_equal(down.scales, whole.scales) and np.array_equal(down.values, whole.values)
    out = weights["layers.0.attention.out.weight"]
    assert out.shape == (64, 4, 2, 8) and out.scales.shape == (64, 1, 1, 1)
    assert not isinstance(weights["norm.weight"], QArray) and weights["norm.weight"].dtype == jax.numpy.bfloat16
    assert {(leaf.shape, leaf.dtype) for leaf in graph.leaves(weights)} == {(array.shape, array.dtype) for array in graph.arrays}


BROKEN = {
    "missing": (lambda t: t.pop(DOWN), f"tensor '{DOWN}': expected shape [64, 96] as config.json asks for, found no such tensor"),
    "missing part": (lambda t: t.pop(UP), f"tensor '{UP}': expected shape [96, 64]"),
    "extra": (lambda t: t.update(more=np.ones(2, np.float32)), "tensor 'more': expected only tensors that the model uses"),
    "extra layers": (
        lambda t: t.update({f"model.layers.{n}.mlp.down_proj.weight": t[DOWN] for n in range(2, 5)}),
        "one that config.json does not ask for (2 more like it)",
    ),
    "extra bias": (lambda t: t.update({"model.layers.0.mlp.down_proj.bias": np.ones(64, np.float32)}), "mlp.down_proj.bias"),
    "misshapen": (
        lambda t: t.update({DOWN: t[DOWN][:, :95]}),
        f"tensor '{DOWN}': expected shape [64, 96] as config.json asks for, found [64, 95]",
    ),
    "transposed": (lambda t: t.update({DOWN: t[DOWN].T.copy()}), "found [96, 64]"),
    "one dimension more": (lambda t: t.update({DOWN: t[DOWN][None]}), "found [1, 64, 96]"),
    "heads of another model": (
        lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": np.ones((16, 64), np.float32)}),
        "expected shape [32, 64]",
    ),
    "whole numbers": (lambda t: t.update({DOWN: t[DOWN].astype(np.int32)}), "expected a floating dtype, found int32"),
    "quantised": (lambda t: t.update({DOWN: t[DOWN].astype(np.int8)}), "config.json has no quantization_config that says"),
    "renamed": (
        lambda t: t.update({"model.embed.weight": t.pop("model.embed_tokens.weight")}),
        "tensor 'model.embed_tokens.weight': expected shape [128, 64]",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_one_clear_error(case, copy):
    change, words = BROKEN[case]
    with pytest.raises(CheckpointError) as error:
        read.load(rewrite(copy(), change), golden_graph("linear"), make_mesh({}))
    assert words in str(error.value) and "model.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_harmless_tensors_are_left_unread(copy):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    read.load(rewrite(copy(), change), golden_graph("linear"), make_mesh({}))
    tied = lambda tensors: tensors.update({"lm_head.weight": np.ones((128, 64), np.float32)})
    read.load(rewrite(copy("llama3"), tied), golden_graph("llama3"), make_mesh({}))


def test_numbers_that_do_not_fit_the_dtype(copy):
    def change(tensors):
        tensors[DOWN] = tensors[DOWN] + np.float32(1e6)

    folder = rewrite(copy(), change)
    with pytest.raises(
        CheckpointError, match=r"expected numbers that float16 can hold, found larger ones in float32; use --dtype bfloat16"
    ):
        read.load(folder, golden_graph("linear", "float16"), make_mesh({}))
    read.load(folder, golden_graph("linear", "bfloat16"), make_mesh({}))


def test_a_weight_that_is_not_a_number_is_not_quantised(copy):
    def change(tensors):
        tensors[DOWN] = tensors[DOWN] * np.float32(np.nan)

    folder = rewrite(copy(), change)
    with pytest.raises(CheckpointError, match=f"tensor '{DOWN}': a weight that is NaN or infinite"):
        read.load(folder, golden_graph("linear", "float32", Quantization("int8")), make_mesh({}))


def test_a_file_that_shrinks_after_the_check(monkeypatch, copy):
    folder, plan = copy(), read._plan

    def shrinking(*arguments):
        loaders = plan(*arguments)
        os.truncate(folder / "model.safetensors", 5000)
        return loaders

    monkeypatch.setattr(read, "_plan", shrinking)
    with pytest.raises(CheckpointError, match="the file was truncated"):
        read.load(folder, golden_graph("linear"), make_mesh({}))


def test_code_in_a_model_folder_is_not_touched(copy):
    folder = copy("grouped")
    (folder / "modeling_llama.py").write_text("raise SystemExit('code was run')")
    (folder / "config.py").symlink_to(folder / "absent")
    read.load(folder, golden_graph("grouped"), make_mesh({}))


def test_config(copy):
    folder = copy()
    assert read.read_config(folder)["model_type"] == "llama"
    (folder / "config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match=r"config\.json: expected a JSON object, found list"):
        read.read_config(folder)


def test_headers_alone_tell_what_is_missing(copy):
    read.verify(GOLDEN / "linear", golden_graph("linear"))
    folder = rewrite(copy(), lambda tensors: tensors.pop(DOWN))
    with pytest.raises(CheckpointError, match=DOWN.replace(".", r"\.")):
        read.verify(folder, golden_graph("linear"))
