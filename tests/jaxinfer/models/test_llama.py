"""The model against Hugging Face: golden files from random twins, through the loader and the paged path, on one device and on eight."""

from dataclasses import replace

import numpy as np
import pytest

from jaxinfer.config import ConfigError
from jaxinfer.models import llama
from jaxinfer.models.find import find_shape
from jaxinfer.models.graph import Graph
from jaxinfer.models.layers import HeadShape
from jaxinfer.sharding import make_mesh, struct
from tests.driving import PREFILL, Chunk, Driver, assert_climbs, assert_parity, golden_expected, golden_graph, pack

NAMES = ("grouped", "biased", "llama3", "linear")


@pytest.mark.parametrize("name", ["grouped", "llama3"])
def test_climbs_to_hugging_face_layer_by_layer(name):
    assert_climbs(name)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [*((name, {}) for name in NAMES), ("grouped", {"data": 2, "tensor": 4}), ("biased", {"data": 2, "tensor": 4})],
    ids=str,
)
def test_logits_of_ragged_prompts_are_hugging_faces(name, mesh):
    assert_parity(name, mesh)


@pytest.mark.parametrize("codes", ["int8", "float8_e4m3fn"])
def test_a_quantised_cache_stays_near(codes):
    """With KV heads sharded and replicas of their own, prompts in chunks and tokens one by one.

    Heads of 8 features leave an int8 number off by 0.4 % of their magnitude, a float8 one by 2.5 %; three layers make about thrice that.
    """
    prompts, logits, _ = golden_expected("grouped")
    ours = Driver.golden("grouped", make_mesh({"data": 2, "tensor": 2}), codes=codes).logits(prompts, PREFILL)
    off = np.concatenate(ours) - np.concatenate(logits)
    assert 1e-5 < np.sqrt(np.mean(off**2)) / np.std(np.concatenate(logits)) < (0.02 if codes == "int8" else 0.1)


def test_bfloat16_stays_near():
    prompts, logits, _ = golden_expected("grouped")
    ours = Driver.golden("grouped", dtype="bfloat16").logits(prompts, ([len(prompt) for prompt in prompts],))
    assert np.abs(np.concatenate(ours) - np.concatenate(logits)).mean() < 0.05


def test_reads_a_config():
    config = llama.Config.from_hf(find_shape("llama-3.1-8b"))
    assert (config.layers, config.heads, config.vocab_size) == (32, HeadShape(32, 8, 128), 128256)
    assert config.rope.theta == 500000.0 and config.rope.llama3 is not None and not config.tied_embeddings
    assert golden_graph("llama3").config.heads == HeadShape(4, 1, 24)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hidden_size", None, "config.json has no hidden_size"),
        ("hidden_size", "64", "hidden_size must be a whole number from 1 up, found '64'"),
        ("hidden_size", True, "hidden_size must be a whole number"),
        ("num_hidden_layers", 0, "num_hidden_layers must be a whole number from 1 up, found 0"),
        ("vocab_size", 2**40, "vocab_size must be a whole number"),
        ("num_key_value_heads", 3, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ("num_attention_heads", 5, "no head_dim, and hidden_size 64 is not a multiple of num_attention_heads 5"),
        ("head_dim", 7, "head_dim 7 must be even"),
        ("hidden_act", "gelu", "hidden_act must be one of silu"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps must be a finite number above 0"),
        ("attention_bias", "yes", "attention_bias must be true or false"),
        ("sliding_window", 4096, "sliding_window = 4096 is not implemented"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config = {'quant_method': 'fp8'} is not implemented"),
    ],
)
def test_refuses_a_config_it_does_not_understand(field, value, words):
    config = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama.Config.from_hf(config)
    with pytest.raises(ConfigError) as error:
        llama.Config.from_hf({**config, field: value})
    assert words in str(error.value)


def compiled(config, mesh):
    """The compiled text of one step on a mesh, from descriptions alone."""
    graph = Graph.of(llama, config, "float32")
    driver = Driver(graph, (), mesh)
    step = pack([Chunk(0, (1,))] * 4, driver.replicas, decode=True)
    pool = [struct(spec, mesh) for spec in graph.kv_specs(8, 4)]
    return driver.run.lower(graph.structs(mesh), tuple(pool), step.tokens, step.positions, step.metadata).compile().as_text()


def collectives(text):
    """How often each kind of collective stands in a compiled program."""
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
    found = {kind: sum(f" {kind}(" in line or f" {kind}-start(" in line for line in text.splitlines()) for kind in kinds}
    return {kind: count for kind, count in found.items() if count}


FOUR = replace(llama.TINY, heads=HeadShape(8, 4, 16))


def test_tensor_parallelism_costs_two_reductions_a_layer():
    mesh = make_mesh({"tensor": 4})
    assert collectives(compiled(FOUR, mesh)) == {"all-reduce": 2 * FOUR.layers + 1, "all-gather": 1}  # + embedding; logits
    tied = replace(FOUR, layers=1, tied_embeddings=True, attention_bias=True, mlp_bias=True)
    assert collectives(compiled(tied, mesh)) == {"all-reduce": 2 + 1, "all-gather": 1}


def test_data_parallelism_costs_nothing():
    assert collectives(compiled(replace(FOUR, layers=1), make_mesh({"data": 2}))) == {}


def test_what_does_not_divide_is_replicated():
    odd = replace(llama.TINY, layers=1, vocab_size=127)  # 2 kv heads and 127 tokens over 4 devices; only the MLP divides
    assert collectives(compiled(odd, make_mesh({"tensor": 4}))) == {"all-reduce": 1}


def test_the_pool_is_updated_in_place_on_every_device():
    first = compiled(replace(FOUR, layers=1), make_mesh({"data": 2, "tensor": 4})).splitlines()[0]
    assert first.count("may-alias") + first.count("must-alias") == 1
