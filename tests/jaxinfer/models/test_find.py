"""Model files are found by model_type, well-known shapes by name."""

import dataclasses

import pytest

from jaxinfer.config import ConfigError
from jaxinfer.models import find, llama
from jaxinfer.models.graph import Graph

BILLIONS = {
    "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.55, "llama-3.2-1b": 1.236, "llama-3.2-3b": 3.213, "smollm2-135m": 0.1345, "tiny": 32928e-9,
    "qwen3-8b": 8.19, "qwen3-32b": 32.76, "mixtral-8x7b": 46.70, "gemma3-27b": 27.01,
}  # fmt: skip


def test_finds_the_file():
    assert "llama" in find.model_types()
    assert find.find("llama") is llama


@pytest.mark.parametrize("name", find.model_types())
def test_every_model_file_offers_the_same(name):
    module = find.find(name)
    assert dataclasses.is_dataclass(module.Config) and isinstance(module.TINY, module.Config)
    assert callable(module.Config.from_hf) and callable(module.Model) and callable(module.ignored) and module.WEIGHTS
    assert len(module.TINY.attention_shapes) == len(module.TINY.attention_windows) > 0


@pytest.mark.parametrize("name", ["graph", "layers", "../llama", "jaxinfer.models.llama", "", None, 7])
def test_what_is_not_a_model_is_refused_with_the_list(name):
    with pytest.raises(ConfigError, match=r"is not implemented; there are: .*llama"):
        find.find(name)


def test_the_nearest_name_is_offered():
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        find.find("lama")
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3.1-8b'"):
        find.find_shape("llama3.1-8b")


@pytest.mark.parametrize("name", sorted(find.known_shapes()))
def test_known_shapes_are_configs_of_models_that_exist(name):
    shape = find.find_shape(name)
    assert find.find(shape["model_type"]).Config.from_hf(shape).vocab_size == shape["vocab_size"]


@pytest.mark.parametrize("name", sorted(find.known_shapes()))
def test_known_shapes_have_the_parameters_their_names_say(name):
    shape = find.find_shape(name)
    module = find.find(shape["model_type"])
    graph = Graph.of(module, module.Config.from_hf(shape), "bfloat16")
    assert graph.nbytes / 2e9 == pytest.approx(BILLIONS[name], rel=2e-3)


def test_shapes_of_architectures_that_are_missing_are_known_and_refused(monkeypatch):
    monkeypatch.setattr(find, "model_types", lambda: ("llama",))
    assert {"qwen3-8b", "gemma3-27b", "mixtral-8x7b"} <= set(find.shapes_without_model())
    for name in find.shapes_without_model():
        assert find.is_shape(name) and name not in find.known_shapes()
        with pytest.raises(
            ConfigError, match=rf"{name} has model_type '\w+', which is not implemented here yet .*shapes that can run: .*llama"
        ):
            find.find_shape(name)
    assert find.is_shape("llama-3.1-8b") and not find.is_shape("abacus")
