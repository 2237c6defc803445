"""The committed checkpoints are consistent: sizes, names, index, tokenizer, config."""

import json
from pathlib import Path

import numpy as np
import pytest

from checkpoints import export, vocabulary

ROOT = Path(__file__).parents[2] / "checkpoints"
BOTH = pytest.mark.parametrize(("name", "shape", "limit"), [("demo", export.DEMO, 32_000_000), ("draft", export.DRAFT, 6_000_000)])


@BOTH
def test_weights_fit_config_and_index(name: str, shape: export.Shape, limit: int):
    tensors = export.read_checkpoint(ROOT / name)
    assert {tensor: array.shape for tensor, array in tensors.items()} == export.tensor_shapes(shape)
    assert json.loads((ROOT / name / "config.json").read_text()) == json.loads(json.dumps(export.hf_config(shape)))
    assert all(np.isfinite(array.astype(np.float32)).all() for array in tensors.values())
    files = list((ROOT / name).iterdir())
    assert all(path.stat().st_size < 8_000_000 for path in files) and sum(path.stat().st_size for path in files) <= limit
    index = json.loads((ROOT / name / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files if path.suffix == ".safetensors"}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())


@BOTH
def test_tokenizer_files_are_those_the_script_writes(name: str, shape: export.Shape, limit: int):
    tokenizer = vocabulary.Tokenizer.from_file(str(ROOT / name / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == shape.vocab_size
    assert json.loads((ROOT / name / "tokenizer_config.json").read_text()) == vocabulary.tokenizer_config(tokenizer)
    assert json.loads((ROOT / name / "generation_config.json").read_text()) == vocabulary.generation_config()


def test_parameter_counts():
    assert export.parameter_count(export.DEMO) == 14_555_520 and export.parameter_count(export.DRAFT) == 2_360_256


def test_demo_and_draft_share_the_tokenizer():
    assert (ROOT / "demo" / "tokenizer.json").read_bytes() == (ROOT / "draft" / "tokenizer.json").read_bytes()
