"""One tiny random model in Hugging Face's layout and the engines on it that all tests share: compiling is what costs time.

After each test every shared engine is idle again and knows nothing of what its KV pool holds, whatever the test did with either.
"""

import json

import pytest

from jaxinfer.cache.pages import PagePool
from jaxinfer.cache.prefix import PrefixIndex
from jaxinfer.config import CacheConfig, EngineConfig, ExecutionConfig, MeshShape, ModelConfig, SchedulerConfig, SpeculationConfig
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.scheduler import Limits, Scheduler
from tests.fakes import byte_tokenizer

CONFIG = {
    "model_type": "llama", "vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def write_folder(folder, **config):
    """A model folder without weights: `load_format="random"` makes them up, the same ones each time."""
    tokenizer = byte_tokenizer()
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|bos|>", "eos_token": "<|eos|>"}))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 7, "do_sample": True}))
    return folder


def settings(folder, *, sequences=4, mesh=None, policy="fcfs", deterministic="off", speculation=None, **model):
    """Settings that compile few and small programs."""
    return EngineConfig(
        ModelConfig(**{"model": str(folder), "dtype": "float32", "load_format": "random", **model}),
        CacheConfig(page_size=4),
        SchedulerConfig(max_sequences=sequences, max_step_tokens=32, max_waiting=16, policy=policy),
        ExecutionConfig(mesh=mesh or MeshShape(), compilation_cache="off", deterministic=deterministic),
        speculation or SpeculationConfig(),
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def progress():
    """What the plain engine reported while it was built."""
    return []


@pytest.fixture(scope="session")
def engines_made():
    """The shared engines made so far, each with the scheduler that it was made with."""
    return []


@pytest.fixture(autouse=True)
def left_idle(engines_made):
    """No test sees what the one before left in an engine."""
    yield
    for engine, usual in engines_made:
        for part in (engine._active, engine._pending, engine._flights):
            part.clear()
        engine.scheduler = Scheduler(usual.limits, [PagePool(pool.size, 4, PrefixIndex(4)) for pool in usual.pools])


def share(engines_made, engine):
    engines_made.append((engine, engine.scheduler))
    return engine


@pytest.fixture(scope="session")
def plain(folder, progress, engines_made):
    """One device, room for everybody."""
    return share(engines_made, Engine(settings(folder), progress=lambda *report: progress.append(report)))


def scheduler(limits, pages, policy="fcfs"):
    """A scheduler that knows nothing of what the pool holds."""
    return Scheduler(limits, [PagePool(pages, 4, PrefixIndex(4))], policy)


@pytest.fixture
def reschedule(plain):
    """Put the same programs behind another scheduler for the length of a test."""

    def replace(limits, pages, policy="fcfs"):
        assert pages <= plain.program.config.pool.pages
        plain.scheduler = scheduler(limits, pages, policy)
        return plain

    return replace


@pytest.fixture
def cramped(reschedule):
    """The same programs behind little KV memory and small steps: prompts come in chunks, sequences are preempted all the time."""
    return reschedule(Limits(sequences=4, prefill_tokens=11, prefill_rows=2), 17)


@pytest.fixture(scope="session")
def meshed(folder, engines_made):
    """Two replicas of two shards."""
    return share(engines_made, Engine(settings(folder, mesh=MeshShape(data=2, tensor=2), sequences=1)))


@pytest.fixture(scope="session")
def speculating(folder, engines_made):
    """As the plain engine, with drafts whatever they cost: from the text, and from a draft model that is the model itself."""
    engine = Engine(settings(folder, speculation=SpeculationConfig("auto", str(folder), 2)))
    engine.speculator.always = True
    return share(engines_made, engine)
