"""One tiny model with real (made-up) weights in a folder, and its engines, unquantised and int8, that all tests of the audit share."""

import json

import numpy as np
import pytest

from jaxinfer import prompts
from jaxinfer.api import LLM
from jaxinfer.audit import forced, session
from jaxinfer.audit.session import Options
from jaxinfer.config import EngineConfig, ExecutionConfig, ModelConfig, SchedulerConfig
from tests.fakes import TEMPLATE
from tests.jaxinfer.conftest import write_folder
from tests.weight_files import write

LINES = (
    {"prompt": "Once upon a", "completion": " time there was"},
    {"messages": [{"role": "user", "content": "hi"}]},
    {"prompt": "two"},
)  # fmt: skip
MAX_TOKENS, LAYERS = 4, 1


class Kept(LLM):
    """An engine that stays open for the next test."""

    def close(self):
        pass


def write_model(folder):
    """A model folder whose weights are large enough that int8 changes something."""
    write_folder(folder, num_hidden_layers=LAYERS)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": TEMPLATE})
    )
    random, hidden, heads, mlp = np.random.default_rng(3), 32, 4 * 8, 48
    shapes = {"model.embed_tokens.weight": (272, hidden), "lm_head.weight": (272, hidden), "model.norm.weight": (hidden,)}
    for layer in range(LAYERS):
        own = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (heads, hidden),
            "self_attn.k_proj": (16, hidden), "self_attn.v_proj": (16, hidden), "self_attn.o_proj": (hidden, heads),
            "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    write(folder / "model.safetensors", {name: random.normal(0.3, 0.5, shape).astype(np.float32) for name, shape in shapes.items()})
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("audited"))


@pytest.fixture(scope="session")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in LINES) + "\n")
    return path


@pytest.fixture(scope="session")
def engines(model):
    """By the name of the scheme."""

    def build(**changes):
        config = EngineConfig(
            ModelConfig(str(model), dtype="float32", max_model_len=64, **changes),
            scheduler=SchedulerConfig(max_sequences=2, max_step_tokens=16),
            execution=ExecutionConfig(compilation_cache="off", deterministic="on"),  # fewest programs
        )  # fmt: skip
        return Kept.build(config)

    return {None: build(), "int8": build(quantize="int8")}


@pytest.fixture(scope="session")
def basis(engines, lines):
    plain = engines[None]
    documents = prompts.encode(prompts.read(lines), plain.tokenizer, 64)
    return session.begin(plain, documents, Options(MAX_TOKENS, 0.02, False, 1, 0, None))


@pytest.fixture(scope="session")
def judged(basis, engines):
    """The int8 scheme and its traces."""
    return session.judge(basis, "int8", engines["int8"], 64)


@pytest.fixture
def shared(engines, judged, model, monkeypatch):
    """The command takes the engines that are open already, and what forcing the same texts through them gave."""
    asked = []

    def opened(config):
        asked.append(config)
        return engines[None if config.model.model == str(model) and not config.model.quantize else "int8"]

    monkeypatch.setattr(forced, "compare", lambda reference, other, texts: judged[1])
    monkeypatch.setattr(session, "open_engine", opened)
    return asked
