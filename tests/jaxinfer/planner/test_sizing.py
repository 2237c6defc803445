"""Defaults of a platform, and the way from settings to a pool and its programs."""

from dataclasses import replace

import jax
import pytest

from jaxinfer.config import CacheConfig, ConfigError, EngineConfig, ExecutionConfig, ModelConfig, SchedulerConfig, SpeculationConfig
from jaxinfer.models.layers import Placement
from jaxinfer.planner import sizing
from jaxinfer.planner.sizing import Machine, Sizing, Widths, described
from jaxinfer.sharding import make_mesh
from jaxinfer.step.buckets import buckets, fixed
from jaxinfer.step.program import Program
from tests.jaxinfer.conftest import CONFIG

SMALL = EngineConfig(ModelConfig(dtype="float32"), CacheConfig(page_size=4), SchedulerConfig(max_sequences=4, max_step_tokens=32))


def sizes(memory=1 << 30, config=SMALL):
    return Sizing(config, described(CONFIG, config, "cpu"), Placement(make_mesh({})), Machine("cpu", memory))


def test_defaults_follow_from_the_platform():
    config = EngineConfig()
    assert sizing.widths(config, "cpu") == Widths(64, 512) and sizing.widths(config, "tpu") == Widths(256, 2048)
    assert sizing.page_size(config, "cpu") == 32 and sizing.page_size(config, "gpu") == 64
    assert sizing.dtype("auto", "cpu") == "float32" and sizing.dtype("auto", "tpu") == jax.numpy.bfloat16
    assert sizing.page_size(SMALL, "gpu") == 4 and sizing.widths(SMALL, "gpu") == Widths(4, 32)


def test_there_is_one_list_of_buckets():
    assert sizing.bucket_list(SMALL, "gpu") == buckets(4, 32)
    exact = replace(SMALL, execution=ExecutionConfig(deterministic="on"), scheduler=SchedulerConfig(max_sequences=4))
    assert sizing.bucket_list(exact, "gpu") == fixed(4, 4)


def test_a_model_from_its_config_alone():
    assert described(CONFIG, SMALL, "cpu").max_tokens == 64
    quantised = replace(SMALL, model=ModelConfig(dtype="float32", quantize="int8", max_model_len=32))
    made = described(CONFIG, quantised, "cpu")
    assert made.max_tokens == 32 and made.graph.nbytes < 0.5 * described(CONFIG, SMALL, "cpu").graph.nbytes
    with pytest.raises(ConfigError, match="--max-model-len 65 exceeds the 64 tokens"):
        described(CONFIG, replace(SMALL, model=ModelConfig(max_model_len=65)), "cpu")
    with pytest.raises(ConfigError, match="of a quantised checkpoint, whose files say how; plan for the folder"):
        described({**CONFIG, "quantization_config": {"quant_method": "awq"}}, SMALL, "cpu")
    with pytest.raises(ConfigError, match="model_type 'mamba' is not implemented"):
        described({**CONFIG, "model_type": "mamba"}, SMALL, "cpu")


def test_with_room_nothing_is_compiled_to_size_the_pool(monkeypatch):
    monkeypatch.setattr(Program, "measure", lambda self: pytest.fail("compiled"))
    memory, program = sizes().sized()
    assert memory.pool.pages == 4 * 16 + 1 and program.config.pool == memory.pool and not memory.unsure


@pytest.mark.parametrize("spare", [-2_000, 9_000])
def test_where_the_guess_leaves_little_room_the_compiler_is_asked(monkeypatch, spare):
    """Too tight for all sequences, and not tight but with less left than the guess itself."""
    monkeypatch.setattr(Program, "measure", lambda self: 20_000)
    account = sizes(1 << 30).account()
    whole = account.weights + account.slots + account.guess - (1 << 25) + (account.wanted + 1) * account.page
    memory = int((whole + spare) / (0.9 - 1 / 32))
    assert sizes(memory).planned()[0].unsure and sizes(memory).planned()[0].tight == (spare < 0)
    assert sizes(memory).sized()[0].programs == 20_000 * 9 // 8


def test_what_drafts_is_what_a_start_takes():
    small, drafts = ModelConfig(model="other", quantize="int8", max_model_len=32), SpeculationConfig("draft", "smaller")
    config = replace(SMALL, model=small, speculation=drafts)
    assert sizing.draft_of(config) == sizing.Draft("smaller") and sizing.draft_of(SMALL) is None
    assert sizing.draft_of(replace(SMALL, speculation=SpeculationConfig("auto"))) == sizing.Draft("draft")
    assert sizing.draft_of(replace(config, speculation=SpeculationConfig("auto"))) is None
    with pytest.raises(ConfigError, match="--speculate draft needs --draft-model"):
        sizing.draft_of(replace(config, speculation=SpeculationConfig("draft")))


def test_a_head_is_named_or_made_up_where_shapes_are_enough():
    config = replace(SMALL, speculation=SpeculationConfig("eagle"))
    with pytest.raises(ConfigError, match="the model's EAGLE-3 head"):
        sizing.draft_of(config)
    assert sizing.draft_of(config, weights=False) == sizing.Draft(None)
    model = described(CONFIG, SMALL, "cpu")
    head = sizing.with_draft(model, None, None, config, "cpu").draft
    assert head is not None and head.tapped and head.config.vocab_size == model.graph.config.vocab_size
    with pytest.raises(ConfigError, match="no EAGLE-3 head; use --speculate draft"):
        sizing.beside(model.graph, CONFIG, None, config, "cpu")
    with pytest.raises(ConfigError, match="is an EAGLE-3 head"):
        sizing.beside(model.graph, None, None, replace(SMALL, speculation=SpeculationConfig("draft")), "cpu")


def test_a_draft_model_is_described_without_the_models_settings():
    model = sizing.with_draft(described(CONFIG, SMALL, "cpu"), CONFIG, None, replace(SMALL, model=ModelConfig(quantize="int8")), "cpu")
    assert model.draft == described(CONFIG, replace(SMALL, model=ModelConfig()), "cpu").graph
