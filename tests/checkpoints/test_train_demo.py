"""The smoke run trains on a CPU without any text, exports, and what it wrote reads back; a run can be resumed."""

import json
from pathlib import Path

import numpy as np
import pytest

from checkpoints import train_demo
from checkpoints.export import Shape, read_checkpoint, tensor_shapes


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smoke")
    train_demo.main(["--smoke", "--out", str(out)])
    return out


@pytest.mark.filterwarnings("default")
def test_smoke_run_learns_and_exports(smoke: Path):
    report = json.loads((smoke / "report.json").read_text())
    first, last = report["curve"][0], report["curve"][-1]
    for pool in ("prose", "chat", "draft"):
        assert last[pool] < first[pool] - 1.0
    assert 0 < report["bits_per_byte"] < 4
    assert set(report["skills"]) >= {"addition", "json_extraction", "tool_call"}
    tensors = read_checkpoint(smoke / "demo")
    assert {name: array.shape for name, array in tensors.items()} == tensor_shapes(Shape(1024, 64, 128, 2, 2, 1, 32, 256))
    assert all(np.isfinite(array.astype(np.float32)).all() for array in tensors.values())
    assert json.loads((smoke / "demo" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert (smoke / "draft" / "tokenizer.json").read_bytes() == (smoke / "demo" / "tokenizer.json").read_bytes()


@pytest.mark.ci
@pytest.mark.filterwarnings("default")
def test_a_run_resumes_where_it_stopped(smoke: Path):
    report = train_demo.main(
        ["--smoke", "--out", str(smoke), "--resume", "--steps", "60", "--tokenizer", str(smoke / "demo/tokenizer.json")]
    )
    assert report["steps"] == 60 and report["curve"][0]["step"] == 41
    assert report["curve"][0]["prose"] < 5.5  # a fresh start begins at ln(1024) = 6.9


def test_texts_are_asked_for():
    with pytest.raises(SystemExit, match="--data"):
        train_demo.main(["--out", "unused"])
