"""Gemma 3's text model against Hugging Face, and what its config may say."""

import pytest

from jaxinfer.config import ConfigError
from jaxinfer.models import gemma3_text
from jaxinfer.models.find import find_shape
from jaxinfer.models.layers import HeadShape
from jaxinfer.models.rope import Rope
from tests.driving import assert_climbs, assert_parity

SHAPE = find_shape("gemma3-27b")


def test_climbs_to_hugging_face_layer_by_layer():
    assert_climbs("gemma3")


@pytest.mark.ci
@pytest.mark.parametrize("mesh", [{}, {"data": 2, "tensor": 2}], ids=str)
def test_logits_of_ragged_prompts_are_hugging_faces(mesh):
    """Prompts of up to 17 tokens under windows of 6: a window that is off by one shows."""
    assert_parity("gemma3", mesh)


def test_reads_a_config():
    config = gemma3_text.Config.from_hf(SHAPE)
    assert (config.layers, config.heads, config.attention_scale, config.tied_embeddings) == (62, HeadShape(32, 16, 128), 168**-0.5, True)
    assert config.attention_windows[:7] == (1024,) * 5 + (None, 1024) and config.attention_windows.count(None) == 10
    assert (config.rope, config.local_rope) == (Rope(1e6, 8.0), Rope(1e4))


def test_both_forms_of_ropes_and_patterns_say_the_same():
    forgotten = ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")
    newer = {name: value for name, value in SHAPE.items() if name not in forgotten}
    kinds = ["sliding_attention" if number % 6 else "full_attention" for number in range(1, 63)]
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = gemma3_text.Config.from_hf(SHAPE)
    assert gemma3_text.Config.from_hf({**newer, "layer_types": kinds, "rope_parameters": ropes}) == config
    assert gemma3_text.Config.from_hf({**newer, "_sliding_window_pattern": 6, "rope_parameters": ropes}) == config
    with pytest.raises(ConfigError, match="rope_parameters must describe sliding_attention and full_attention or one rope"):
        gemma3_text.Config.from_hf({**newer, "rope_parameters": {"full_attention": ropes["full_attention"]}})


def test_defaults_are_hugging_faces():
    given = {name: SHAPE[name] for name in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "sliding_window")}
    config = gemma3_text.Config.from_hf(given)
    assert (config.vocab_size, config.heads, config.attention_scale) == (262208, HeadShape(8, 4, 256), 1 / 16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types must name sliding_attention or full_attention for each of 62 layers"),
        ({"layer_types": ["chunked_attention"] * 62}, "layer_types must name"),
        ({"hidden_activation": "silu"}, "hidden_activation must be one of gelu_pytorch_tanh"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not implemented for 'gemma3_text'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = true is not implemented"),
    ],
)
def test_refuses_a_config_it_does_not_understand(changes, words):
    with pytest.raises(ConfigError, match=words):
        gemma3_text.Config.from_hf({**SHAPE, **changes})
