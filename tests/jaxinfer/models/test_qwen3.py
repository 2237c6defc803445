"""Qwen 3 against Hugging Face, and what its config may say."""

import pytest

from jaxinfer.config import ConfigError
from jaxinfer.models import qwen3
from jaxinfer.models.find import find_shape
from jaxinfer.models.layers import HeadShape
from tests.driving import assert_climbs, assert_parity


def test_climbs_to_hugging_face_layer_by_layer():
    assert_climbs("qwen3")


@pytest.mark.ci
@pytest.mark.parametrize("mesh", [{}, {"data": 2, "tensor": 2}], ids=str)
def test_logits_of_ragged_prompts_are_hugging_faces(mesh):
    assert_parity("qwen3", mesh)


def test_reads_a_config():
    shape = find_shape("qwen3-8b")
    config = qwen3.Config.from_hf(shape)
    assert (config.layers, config.heads, config.rope.theta, config.tied_embeddings) == (36, HeadShape(32, 8, 128), 1e6, False)
    unwritten = {name: value for name, value in shape.items() if name != "head_dim"}
    assert qwen3.Config.from_hf(unwritten | {"num_attention_heads": 16}).heads == HeadShape(16, 8, 128)
    qwen3.Config.from_hf({**shape, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 36})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding_window = 4096 is not implemented for 'qwen3'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .* only full_attention is"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of silu"),
        ({"num_attention_heads": 12}, "num_attention_heads 12 must be a multiple of num_key_value_heads 8"),
    ],
)
def test_refuses_a_config_it_does_not_understand(changes, words):
    with pytest.raises(ConfigError, match=words):
        qwen3.Config.from_hf({**find_shape("qwen3-8b"), **changes})
