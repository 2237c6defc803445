"""An EAGLE-3 head's config and weights as public checkpoints have them; what its numbers are is checked in pages (`step/test_head.py`)."""

import json
from dataclasses import replace

import numpy as np
import pytest

from jaxinfer.checkpoint import read
from jaxinfer.config import ConfigError, EngineConfig, ModelConfig
from jaxinfer.models import eagle, llama
from jaxinfer.models.graph import Graph
from jaxinfer.models.rope import Llama3Scaling, Rope
from jaxinfer.planner import sizing
from jaxinfer.sharding import make_mesh
from tests.weight_files import write

PUBLIC = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "vocab_size": 128, "draft_vocab_size": 48, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "rms_norm_eps": 1e-5, "rope_theta": 500000, "max_position_embeddings": 2048, "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip
SHAPES = {
    "fc.weight": (64, 192), "midlayer.hidden_norm.weight": (64,), "midlayer.input_layernorm.weight": (64,),
    "midlayer.post_attention_layernorm.weight": (64,), "midlayer.self_attn.q_proj.weight": (64, 128),
    "midlayer.self_attn.k_proj.weight": (32, 128), "midlayer.self_attn.v_proj.weight": (32, 128),
    "midlayer.self_attn.o_proj.weight": (64, 64), "midlayer.mlp.gate_proj.weight": (96, 64), "midlayer.mlp.up_proj.weight": (96, 64),
    "midlayer.mlp.down_proj.weight": (64, 96), "norm.weight": (64,), "lm_head.weight": (48, 64),
}  # fmt: skip


def config(**changes):
    return eagle.Config.from_hf(PUBLIC | changes, llama.TINY)


@pytest.fixture
def folder(tmp_path):
    """A folder as they are published, in float16, its draft vocabulary every second token."""
    draw = np.random.default_rng(0)
    tensors = {name: draw.normal(size=shape).astype(np.float16) for name, shape in SHAPES.items()}
    tensors["d2t"] = np.arange(48, dtype=np.int64)
    tensors["t2d"] = np.isin(np.arange(128), 2 * np.arange(48))
    write(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC))
    return tmp_path, tensors


@pytest.mark.parametrize("own", [False, True])
def test_reads_the_public_layout(folder, own):
    folder, tensors = folder
    if own:
        tensors["embed_tokens.weight"] = np.ones((128, 64), np.float16)
        (folder / "model.safetensors").unlink()
        write(folder / "model.safetensors", tensors)
    graph = sizing.beside(
        Graph.of(llama, llama.TINY, "float32"), read.read_config(folder), folder, EngineConfig(ModelConfig("any")), "cpu"
    )
    assert graph.config.own_embedding == own == ("embedding.weight" in graph.names)
    loaded = read.load(folder, graph, make_mesh({}))
    weights = {name: np.asarray(value) for name, value in loaded.items()}
    assert (weights["fuse.weight"] == tensors["fc.weight"]).all() and (weights["lm_head.weight"] == tensors["lm_head.weight"]).all()
    assert (weights["attention.qkv.weight"][1, 2] == tensors["midlayer.self_attn.k_proj.weight"][16:]).all()
    assert weights["d2t"].dtype == np.int32
    assert (np.asarray(graph.bind(graph.leaves(loaded)).targets()) == 2 * np.arange(48)).all()


def test_where_the_target_is_tapped():
    assert eagle.usual(32) == (2, 16, 29) and eagle.usual(2) == (1, 1, 1) and eagle.usual(1) == (0, 0, 0)
    deep = llama.Config(**{**vars(llama.TINY), "layers": 32})

    def tapped(**fields):
        return eagle.Config.from_hf(PUBLIC | fields, deep).tapped

    assert tapped() == (2, 16, 29)
    assert tapped(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 15, 28]}) == (2, 16, 29)  # what comes out of layers
    assert tapped(eagle_aux_hidden_state_layer_ids=[2, 16, 32]) == (2, 16, 32)  # what goes into them
    with pytest.raises(ConfigError, match="must be 3 layers of the target's 32, found"):
        tapped(eagle_aux_hidden_state_layer_ids=[2, 16, 33])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 256}, "made for a model of 64 features and 256 tokens, the target has 64 and 128"),
        ({"hidden_size": 32}, "32 features, its target 64: it needs an embed_tokens"),
        ({"target_hidden_size": 32}, "made for a model of 32 features"),
        ({"num_hidden_layers": 2}, "num_hidden_layers must be 1"),
        ({"norm_before_residual": True}, "norm_before_residual = true is not implemented"),
        ({"draft_vocab_size": 129}, "draft_vocab_size 129 is above"),
    ],
)
def test_heads_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**({"target_hidden_size": 64} | changes))


@pytest.mark.parametrize("rope", [Rope(5e5), Rope(1e4, 2.0), Rope(5e5, 8.0, Llama3Scaling(1.0, 4.0, 8192.0))])
def test_what_is_written_is_read(rope):
    deep = llama.Config(**{**vars(llama.TINY), "layers": 32})
    for tapped in ((2, 16, 29), (3, 9, 32)):
        made = replace(config(), tapped=tapped, rope=rope, target_size=64)
        assert eagle.is_head(made.to_hf(512, "bfloat16")) and eagle.Config.from_hf(made.to_hf(512, "bfloat16"), deep) == made
    with pytest.raises(ValueError, match="cannot be written"):
        replace(made, tapped=(1, 5, 9)).to_hf(512, "bfloat16")


def test_what_a_head_is_and_is_not():
    assert eagle.is_head(PUBLIC) and eagle.is_head({"architectures": ["LlamaForCausalLMEagle3"]})
    assert not eagle.is_head({"architectures": ["LlamaForCausalLM"]}) and not eagle.is_head({})


def test_a_head_of_the_models_own_shape():
    made = eagle.Config.beside(llama.TINY, 32)
    assert (made.draft_vocab_size, made.hidden_size, made.attention_shapes) == (32, 64, llama.TINY.attention_shapes[:1])
    with pytest.raises(ConfigError, match="cannot be made up"):
        eagle.Config.beside(object())


def test_features_have_pages_of_their_own():
    graph = Graph.of(eagle, config(), "float32")
    assert graph.tapped == (1, 1, 1) and Graph.of(llama, llama.TINY, "float32").tapped == ()
    *_, kept = graph.kv_specs(9, 4)
    assert (kept.shape, kept.axes) == ((9, 4, 64), ("pages", None, "embed"))
