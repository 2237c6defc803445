"""Activations are seen on the user's texts, and the factors make int8 activations better where a few inputs are large."""

import json

import numpy as np
import pytest

from jaxinfer.checkpoint import calibrate, read
from jaxinfer.checkpoint.convert import convert
from jaxinfer.config import ConfigError
from jaxinfer.models import find, llama
from jaxinfer.models.graph import Graph, Quantization
from jaxinfer.sharding import make_mesh
from jaxinfer.tokenizer import Tokenizer
from tests.driving import Driver
from tests.quantised_files import tiny_model
from tests.weight_files import read_all, write

W8A8 = Quantization.parse("w8a8")
LOUD = 5  # an input that is 64 times as large as the others


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose first norm makes one input large, and the columns behind it small: the same function."""
    folder = tiny_model(tmp_path_factory.mktemp("calibrate") / "model")
    tensors = read_all(folder / "model.safetensors")
    layer = "model.layers.0."
    tensors[layer + "input_layernorm.weight"][LOUD] *= 64
    for name in "qkv":
        tensors[f"{layer}self_attn.{name}_proj.weight"][:, LOUD] /= 64
    write(folder / "model.safetensors", tensors)
    return folder


@pytest.fixture(scope="module")
def texts(model):
    path = model.parent / "texts.jsonl"
    lines = [{"prompt": "abc def"}, {"prompt": "x" * 30, "completion": "yz"}]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    return path


def graph_of(folder, dtype="float32"):
    values = read.read_config(folder)
    return read.as_stored(folder, Graph.of(find.find("llama"), llama.Config.from_hf(read.of_model(values)), dtype))


TOKENS = [[5, 9, 200], [7] * 12]


@pytest.fixture(scope="module")
def observed(model):
    """The largest inputs on two texts, and what was reported meanwhile."""
    stages = []
    return calibrate.largest_inputs(model, graph_of(model), TOKENS, progress=lambda *report: stages.append(report)), stages


@pytest.fixture
def known(observed, monkeypatch):
    """They need not be observed again."""
    monkeypatch.setattr(calibrate, "largest_inputs", lambda *_, **__: observed[0])


def test_the_largest_inputs_are_those_of_the_model(model, observed):
    """The first layer's, computed by hand."""
    graph, (seen, stages) = graph_of(model), observed
    assert set(seen) == {name for name, contracting in zip(graph.names, graph.contracting, strict=True) if contracting}
    assert {stage for stage, *_ in stages} == {"read", "observe"} and stages[-1] == ("observe", 2, 2)
    tensors = {name: values.astype(np.float32) for name, values in read_all(model / "model.safetensors").items()}
    x = tensors["model.embed_tokens.weight"][sorted({token for text in TOKENS for token in text})]
    normed = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + graph.config.rms_norm_epsilon)
    expected = np.abs(normed * tensors["model.layers.0.input_layernorm.weight"]).max(axis=0)
    assert np.allclose(seen["layers.0.attention.qkv.weight"], expected, rtol=1e-5)
    assert seen["layers.0.attention.out.weight"].shape == (2, 2, 8) and (seen["lm_head.weight"] > 0).all()


def test_factors_are_powers_of_two_where_all_readers_are_w8a8(model, texts, known):
    found = calibrate.factors(model, texts, W8A8)
    first = found["layers.0.attention_norm.weight"]
    assert np.array_equal(np.frexp(first)[0], np.full(32, 0.5)) and first[LOUD] < np.median(first) / 16
    assert first is found["layers.0.attention.qkv.weight"] and "norm.weight" in found and "layers.0.mlp.down.weight" not in found
    some = calibrate.factors(model, texts, Quantization.parse("w8a8,lm_head=int8,layers.1.*=keep"))
    assert set(some) == {f"layers.0.{name}.weight" for name in ("attention_norm", "attention.qkv", "mlp_norm", "mlp.gate_up")}


@pytest.mark.ci
def test_int8_activations_become_better(model, texts, known, tmp_path):
    def logits(folder):
        graph = graph_of(folder)
        driver = Driver(graph, graph.leaves(read.load(folder, graph, make_mesh({}))))
        return driver.logits([[5, 9, 200, 31, 77, 8, 120, 3]], [[8]])[0]

    exact, error = logits(model), {}
    for name, factors in {"plain": None, "balanced": calibrate.factors(model, texts, W8A8)}.items():
        convert(model, tmp_path / name, W8A8, factors=factors)
        error[name] = np.sqrt(np.mean((logits(tmp_path / name) - exact) ** 2))
    assert error["balanced"] < 0.6 * error["plain"]


def test_lines_that_are_not_texts(model, tmp_path):
    (tmp_path / "texts").write_text('{"prompt": "x"}\n["x"]')
    with pytest.raises(ConfigError, match=r"--calibrate .*line 2: a JSON list"):
        calibrate.documents(tmp_path / "texts", Tokenizer.load(model), 100)


def test_what_cannot_be_calibrated(model, texts, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="No such file"):
        calibrate.documents(tmp_path / "none", Tokenizer.load(model), 100)
    assert [len(text) for text in calibrate.documents(texts, Tokenizer.load(model), 10)] == [7, 10]
    monkeypatch.setattr(calibrate, "_observe", lambda graph, placement, leaves, kv, *_: ({"x": np.float32([1, np.nan])}, kv))
    with pytest.raises(calibrate.CheckpointError, match=r"the inputs of x are not finite on the texts of --calibrate"):
        calibrate.factors(model, texts, W8A8)
    monkeypatch.delattr(llama, "NORMS")
    with pytest.raises(ConfigError, match="does not say which norms"):
        calibrate.factors(model, texts, W8A8)
