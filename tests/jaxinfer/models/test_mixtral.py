"""Mixtral against Hugging Face, what its config may say, and experts in 8 bits."""

from dataclasses import replace

import numpy as np
import pytest

from jaxinfer.checkpoint import convert, read
from jaxinfer.config import ConfigError
from jaxinfer.models import mixtral
from jaxinfer.models.experts import ExpertShape
from jaxinfer.models.find import find_shape
from jaxinfer.models.graph import Graph, Quantization
from jaxinfer.models.layers import HeadShape, Placement
from jaxinfer.planner import collectives
from jaxinfer.sharding import make_mesh, struct
from tests.driving import GOLDEN, PREFILL, Chunk, Driver, assert_climbs, assert_parity, golden_expected, golden_graph, pack


def test_climbs_to_hugging_face_layer_by_layer():
    assert_climbs("mixtral")


@pytest.mark.ci
@pytest.mark.parametrize("mesh", [{}, {"data": 2, "tensor": 2}], ids=str)
def test_logits_of_ragged_prompts_are_hugging_faces(mesh):
    assert_parity("mixtral", mesh)


@pytest.mark.ci
@pytest.mark.parametrize("mesh", [{}, {"tensor": 2}], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_experts_of_8_bits_stay_near(scheme, mesh):
    """A router that is not quantised still chooses others where two experts are nearly as good, and a token then goes its own way."""
    prompts, logits, _ = golden_expected("mixtral")
    quantization = Quantization("keep", (("layers.*.experts.*", scheme),))
    ours = Driver.golden("mixtral", make_mesh(mesh), quantization=quantization).logits(prompts, PREFILL)
    off = np.abs(np.concatenate(ours) - np.concatenate(logits)).mean(axis=1) / np.std(np.concatenate(logits))
    assert 1e-4 < np.median(off) < (0.03 if scheme == "int8" else 0.12)


@pytest.mark.ci
def test_tensor_parallelism_costs_two_reductions_a_layer():
    config, mesh = replace(mixtral.TINY, layers=1), make_mesh({"tensor": 2})
    graph = Graph.of(mixtral, config, "float32")
    driver, step = Driver(graph, (), mesh), pack([Chunk(0, (1,))] * 4, 1, decode=True)
    pool = tuple(struct(spec, mesh) for spec in graph.kv_specs(8, 4))
    text = driver.run.lower(graph.structs(mesh), pool, step.tokens, step.positions, step.metadata).compile().as_text()
    found = {each.kind: each.count for each in collectives.in_text(text)}
    assert sum(each.count for each in collectives.in_text(text) if each.kind == "all-reduce") == 2 + 1 and found["all-gather"] == 1
    assert collectives.sharded(graph, Placement(mesh)) == (2 + 1, 1)


@pytest.mark.ci
def test_a_checkpoint_with_experts_in_int8_is_read_as_it_was_written(tmp_path):
    quantization = Quantization("int8")
    convert.convert(GOLDEN / "mixtral", tmp_path / "out", quantization)
    graph = read.as_stored(tmp_path / "out", golden_graph("mixtral", "bfloat16"))
    expected = golden_graph("mixtral", "bfloat16", quantization)
    found, wanted = read.load(tmp_path / "out", graph, make_mesh({"tensor": 2})), read.load(GOLDEN / "mixtral", expected, make_mesh({}))
    for name in ("layers.1.experts.gate_up.weight", "layers.1.experts.down.weight"):
        assert np.array_equal(found[name].values, wanted[name].values) and np.array_equal(found[name].scales, wanted[name].scales)


def test_reads_a_config():
    config = mixtral.Config.from_hf(find_shape("mixtral-8x7b"))
    assert (config.layers, config.heads, config.experts) == (32, HeadShape(32, 8, 128), ExpertShape(8, 2))
    assert not hasattr(mixtral, "NORMS")  # calibration does not see what experts read


def test_schemes_without_arithmetic_for_experts_are_refused():
    for scheme in ("int4", "w8a8"):
        with pytest.raises(ConfigError, match=rf"{scheme} is not implemented for the experts of a mixture, .*experts.*weight=keep"):
            Graph.of(mixtral, mixtral.Config.from_hf(find_shape("mixtral-8x7b")), "bfloat16", Quantization(scheme))
    graph = Graph.of(mixtral, mixtral.TINY, "float32", Quantization("int8", (("layers.0.*", "keep"),)))
    quantised = {name for name, spec in zip(graph.names, graph.specs, strict=True) if hasattr(spec, "scales")}
    assert {"layers.1.experts.gate_up.weight", "layers.1.experts.down.weight", "layers.1.attention.qkv.weight"} < quantised
    assert not any("router" in name or "layers.0" in name for name in quantised)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is above num_local_experts 8"),
        ({"sliding_window": 4096}, "sliding_window = 4096 is not implemented for 'mixtral'"),
        ({"num_local_experts": 0}, "num_local_experts must be a whole number from 1 up"),
    ],
)
def test_refuses_a_config_it_does_not_understand(changes, words):
    with pytest.raises(ConfigError, match=words):
        mixtral.Config.from_hf({**find_shape("mixtral-8x7b"), **changes})
