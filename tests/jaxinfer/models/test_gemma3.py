"""The text model inside a Gemma 3 that reads images."""

import json
import logging

import numpy as np
import pytest

from jaxinfer.checkpoint import read
from jaxinfer.config import ConfigError
from jaxinfer.models import gemma3, gemma3_text
from jaxinfer.models.graph import Graph
from jaxinfer.sharding import make_mesh
from tests.driving import GOLDEN, golden_graph
from tests.weight_files import read_all, write


def test_its_text_model_is_read_and_what_is_for_images_is_not(tmp_path, caplog):
    inner = json.loads((GOLDEN / "gemma3" / "config.json").read_text())
    values = {"model_type": "gemma3", "text_config": inner, "vision_config": {"hidden_size": 8}, "mm_tokens_per_image": 256}
    (tmp_path / "config.json").write_text(json.dumps(values))
    tensors = {f"language_model.{name}": tensor for name, tensor in read_all(GOLDEN / "gemma3" / "model.safetensors").items()}
    images = {"vision_tower.vision_model.post_layernorm.weight": np.zeros(8, np.float32), "multi_modal_projector.x": np.ones(2, np.float32)}
    write(tmp_path / "model.safetensors", tensors | images)
    with caplog.at_level(logging.INFO):
        config = gemma3.Config.from_hf(values)
    assert "part for images is not loaded" in caplog.text
    plain = golden_graph("gemma3")
    assert vars(config) == vars(plain.config)
    found = read.load(tmp_path, Graph.of(gemma3, config, "float32"), make_mesh({}))
    wanted = read.load(GOLDEN / "gemma3", plain, make_mesh({}))
    assert found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in found)


def test_a_config_without_a_text_model_is_refused():
    with pytest.raises(ConfigError, match=r"config.json has no text_config"):
        gemma3.Config.from_hf({"model_type": "gemma3"})
    inner = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": "2"}
    with pytest.raises(ConfigError, match=r"config.json: text_config: num_hidden_layers must be a whole number"):
        gemma3.Config.from_hf({"model_type": "gemma3", "text_config": inner})


def test_every_weight_has_its_name_inside():
    assert gemma3.WEIGHTS.keys() == gemma3_text.WEIGHTS.keys()
    assert gemma3.WEIGHTS["norm.weight"].name == "language_model.model.norm.weight"
    assert "language_model.lm_head.weight" in gemma3.ignored(gemma3.TINY)
