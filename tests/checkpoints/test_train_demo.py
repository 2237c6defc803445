"""A small run trains on a CPU without any text, exports, and what it wrote reads back; a run can be resumed."""

import json
from pathlib import Path

import numpy as np
import pytest

from checkpoints import train_demo
from checkpoints.export import Shape, read_checkpoint, tensor_shapes
from checkpoints.learner import Recipe
from checkpoints.train_demo import Settings

TINY = Shape(1024, 32, 64, 1, 2, 1, 16, 256)


def assert_learnt_and_exported(out: Path, shape: Shape) -> None:
    report = json.loads((out / "report.json").read_text())
    first, last = report["curve"][0], report["curve"][-1]
    for pool in ("prose", "chat", "draft"):
        assert last[pool] < first[pool] - 0.7
    assert 0 < report["bits_per_byte"] < 4
    assert set(report["skills"]) >= {"addition", "json_extraction", "tool_call"}
    tensors = read_checkpoint(out / "demo")
    assert {name: array.shape for name, array in tensors.items()} == tensor_shapes(shape)
    assert all(np.isfinite(array.astype(np.float32)).all() for array in tensors.values())
    assert json.loads((out / "demo" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert (out / "draft" / "tokenizer.json").read_bytes() == (out / "demo" / "tokenizer.json").read_bytes()


@pytest.mark.ci
@pytest.mark.filterwarnings("default")
def test_a_tiny_run_learns_and_exports(tmp_path: Path):
    recipe = Recipe(2, 96, 4, 96, learning_rate=8e-3, draft_learning_rate=8e-3, chat_tokens=20_000)
    train_demo.perform(Settings(TINY, TINY, recipe, tmp_path, steps=30, instances=1, sample_tokens=2))
    assert_learnt_and_exported(tmp_path, TINY)


@pytest.mark.ci
@pytest.mark.filterwarnings("default")
def test_the_smoke_run_learns_and_resumes_where_it_stopped(tmp_path: Path):
    train_demo.main(["--smoke", "--out", str(tmp_path)])
    assert_learnt_and_exported(tmp_path, Shape(1024, 64, 128, 2, 2, 1, 32, 256))
    tokenizer = str(tmp_path / "demo/tokenizer.json")
    report = train_demo.main(["--smoke", "--out", str(tmp_path), "--resume", "--steps", "60", "--tokenizer", tokenizer])
    assert report["steps"] == 60 and report["curve"][0]["step"] == 41
    assert report["curve"][0]["prose"] < 5.5  # a fresh start begins at ln(1024) = 6.9


def test_texts_are_asked_for():
    with pytest.raises(SystemExit, match="--data"):
        train_demo.main(["--out", "unused"])
