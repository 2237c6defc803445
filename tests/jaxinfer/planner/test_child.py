"""The process that plans one slice, driven in this one."""

import io
import json
import sys

import pytest

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.config import ConfigError, MeshShape
from jaxinfer.planner import child, topology
from jaxinfer.planner.collectives import Collective
from jaxinfer.planner.estimate import Choice, estimate
from jaxinfer.planner.outcome import MARK
from jaxinfer.planner.predict import Kernels
from jaxinfer.planner.slices import parse
from jaxinfer.planner.telling import GUESS_NOTE, HOPELESS_NOTE, Compiled
from jaxinfer.step.buckets import Bucket
from tests.jaxinfer.conftest import CONFIG
from tests.jaxinfer.planner.conftest import planned, request

MADE_UP = {"draft": {"values": None, "folder": None}, "config": {"speculate": "eagle"}}


def test_the_best_mesh_for_the_goal_comes_first():
    plan = planned("cpu-2")
    assert plan.fits and plan.settings["mesh"] == plan.meshes[0]["mesh"]
    assert plan.meshes[0]["tokens_per_second"] == max(row["tokens_per_second"] for row in plan.meshes)
    quick = planned("cpu-2", goal="latency")
    assert quick.meshes[0]["itl"] == min(row["itl"] for row in quick.meshes)


def test_what_does_not_fit_says_by_how_much_and_what_would_help(monkeypatch):
    monkeypatch.setattr(topology.devices, "memory_bytes", lambda device: 245_000)
    plan = planned("cpu-1")
    assert not plan.fits and 10_000 < plan.memory["lacking"] < 100_000
    assert "int8 weights" in [each["change"] for each in plan.advice] and all(each["fits"] for each in plan.advice)


@pytest.mark.parametrize(("changed", "words"), [
    ({"context": 65}, "--context 65 exceeds the 64 tokens"), ({"output": 64}, "--output 64 leaves no room"),
    ({"mesh": [1, 3]}, "--mesh data=1,tensor=3 does not use the 4 devices of cpu-4"),
    ({"values": {**CONFIG, "model_type": "mamba"}}, "'mamba' is not implemented"), ({"config": {"quantize": "int9"}}, "int9"),
    ({"bundle": "DIR"}, "--no-compile makes none"), ({"autotune": "FILE", "compile": True}, "add --bundle DIR"),
    ({"bundle": "DIR", "compile": True, **MADE_UP}, "needs a real head"),
    ({"bundle": "DIR", "autotune": "FILE", "compile": True}, "--autotune is for slices of GPUs"),
])  # fmt: skip
def test_what_cannot_work_is_refused(changed, words):
    with pytest.raises(ConfigError, match=words):
        planned(**changed)


def test_defaults_of_context_and_output():
    plan = planned(context=None, output=None, concurrency=None, values={**CONFIG, "max_position_embeddings": 32768})
    assert (plan.settings["context"], plan.settings["output"]) == (8192, 256)
    assert planned(context=16, output=None).settings["output"] == 4


@pytest.mark.parametrize("context", [1024, pytest.param(32768, marks=pytest.mark.ci)])
def test_the_longest_context_is_the_architectures_own(context):
    inner = {name: value for name, value in CONFIG.items() if name != "max_position_embeddings"}
    gemma = {"model_type": "gemma3", "text_config": inner}
    assert planned("cpu-1", context=context, values=gemma).settings["context"] == context
    with pytest.raises(ConfigError, match="--context 131073 exceeds the 131072 tokens"):
        planned("cpu-1", context=131073, values=gemma)


def test_the_result_is_written_and_refusals_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request("cpu-1"))))
    child.main(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["fits"] is True
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request("cpu-1", context=1000))))
    child.main(tmp_path / "refused.json")
    refused = json.loads((tmp_path / "refused.json").read_text())
    assert refused["refused"] and "--context 1000" in refused["failure"] and refused["fits"] is False


@pytest.mark.parametrize("error", [CheckpointError("a tensor is missing"), OSError("the disk is full")])
def test_files_that_cannot_be_read_or_written_are_refusals(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request("cpu-1"))))
    monkeypatch.setattr(child, "planned", fail)
    child.main(tmp_path / "plan.json")
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made["refused"] and made["failure"] == str(error)


def test_what_weights_alone_are_too_large_for_is_not_compiled(monkeypatch):
    monkeypatch.setattr(child, "_compile", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr(topology.devices, "memory_bytes", lambda device: 90_000)
    plan = planned("cpu-1", compile=True)
    assert not plan.fits and plan.memory["lacking"] > 0 and plan.notes[:2] == [HOPELESS_NOTE, GUESS_NOTE]


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("buckets", [[Bucket(0, 0, 4, 5)], [Bucket(0, 0, 4), Bucket(0, 0, 4, 5)]])
def test_drafts_are_no_correction_of_plain_steps(buckets, drafted):
    """Each text holds two sums for each layer of the model and of what drafts, one for each embedding, and the logits of all its tokens."""
    speculate = {"speculate": "draft", "draft_model": "small"} if drafted else {"speculate": "lookup"}
    asked = request("cpu-2", config=speculate, draft={"values": CONFIG, "folder": None} if drafted else None)
    choice = Choice(parse("cpu-2"), MeshShape(1, 2), child._wish(asked), tuple(topology.describe(parse("cpu-2"))))
    sizing, made = choice.sizing(), estimate(choice, Kernels("xla", "xla", "float32"))
    sums, size, vocab = (2 * 2 + 1) * (1 + drafted), CONFIG["hidden_size"] * 4, CONFIG["vocab_size"] * 4
    texts = {it: (Collective("all-reduce", it.tokens * size, sums), Collective("all-gather", it.tokens * vocab, 1)) for it in buckets}
    program = sizing.program(sizing.empty_pool)
    assert child._correction(made, Compiled(program, texts, 0.0)) == 1.0
    twice = {it: found * 2 for it, found in texts.items()}
    assert child._correction(made, Compiled(program, twice, 0.0)) == 2.0


def test_progress_is_marked(capsys):
    child._report("compile", 1, 3)
    assert capsys.readouterr().out == f'{MARK}["compile", 1, 3]\n'
