"""The parent: models by name or config.json, a child that answers, one that dies, refusals."""

import json
import sys

import pytest

import jaxinfer
from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.config import ConfigError
from jaxinfer.models import find
from jaxinfer.planner import planning
from jaxinfer.planner.outcome import MARK, Plan, Wanted
from tests.jaxinfer.conftest import CONFIG


@pytest.fixture
def config_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def child(monkeypatch):
    """Let a line of Python stand for the child."""

    def use(code):
        real = planning.subprocess.Popen
        monkeypatch.setattr(
            planning.subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", code, command[-1]], **options)
        )

    return use


def test_a_plan_from_a_config_json_in_a_process_of_its_own(config_json):
    plan = jaxinfer.plan(str(config_json), "cpu-2", context="32", compile=False, page_size=4, mesh="tensor=2")
    assert plan.fits and plan.settings["mesh"] == "data=1,tensor=2" and plan.settings["context"] == 32


def test_a_bundle_goes_to_a_new_place(config_json, tmp_path):
    with pytest.raises(CheckpointError, match=r"--bundle .*: it exists already; name another folder$"):
        planning.run(str(config_json), "cpu", Wanted(bundle=str(tmp_path)), {})


def test_models_are_found_by_shape_file_or_folder(config_json):
    for model in (config_json, config_json.parent):
        assert planning.read_shape(str(model)) == CONFIG
    assert planning.read_shape("llama-3.1-70b")["num_hidden_layers"] == 80
    assert planning.read_shape("demo")["model_type"] == "llama"


def test_a_repository_is_read_at_its_revision(config_json, child, monkeypatch):
    asked = []
    monkeypatch.setattr(planning.hub, "resolve", lambda *given, patterns: asked.append((*given, patterns)) or config_json.parent)
    child("raise SystemExit(1)")
    planning.run("owner/name", "cpu", Wanted(), {"revision": "v1"})
    assert asked == [("owner/name", "v1", ("config.json",))]


def test_a_head_need_not_be_of_an_architecture_of_its_own(config_json):
    head = {"model_type": "eagle3", "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 64}
    config_json.write_text(json.dumps(head))
    assert planning.read_shape(str(config_json.parent)) == head
    config_json.write_text(json.dumps({"model_type": "eagle3"}))
    with pytest.raises(ConfigError, match="'eagle3' is not implemented"):
        planning.read_shape(str(config_json.parent))


def test_shapes_that_cannot_run_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(find, "model_types", lambda: ("llama",))
    words = r"model_type 'mixtral', which is not implemented .*there are: .*llama.*shapes that can run: llama-3.1-8b"
    for model, message in (("mixtral-8x7b", words), ("llama3.1-8b", "did you mean 'llama-3.1-8b'")):
        with pytest.raises(ConfigError, match=message):
            planning.run(model, "cpu", Wanted(), {})


def test_a_dead_child_is_a_failure_and_no_crash(config_json, child):
    child("import os, sys; sys.stderr.write('the compiler aborts\\n'); sys.stderr.flush(); os.abort()")
    plan = planning.run(str(config_json), "v5e-8", Wanted(), {})
    assert not plan.fits and not plan.refused
    assert "compiles for v5e-8 died (signal 6)" in plan.failure and "the compiler aborts" in plan.failure


def test_progress_comes_through(config_json, child):
    code = f"""
import json, sys
request = json.loads(sys.stdin.read())
print("noise of a compiler")
print({MARK!r} + '["compile", 1, 3]')
plan = dict(model=request["model"], target={{"slice": request["slice"]}}, settings=request["config"], fits=True)
open(sys.argv[1], "w").write(json.dumps(plan))
"""
    child(code)
    seen = []
    plan = planning.run(str(config_json), "v5e-8", Wanted(), {"page_size": 8}, lambda *report: seen.append(report))
    assert plan == Plan(str(config_json), {"slice": "v5e-8"}, {"page_size": 8, "model": str(config_json)}, fits=True)
    assert seen == [("compile", 1, 3)]


@pytest.mark.parametrize(("options", "words"), [
    ({"contxt": 8}, "no option 'contxt'"), ({"goal": "speed"}, "--goal 'speed' is not one of"), ({"page_size": 3}, "--page-size 3"),
])  # fmt: skip
def test_options_that_cannot_work(config_json, options, words):
    with pytest.raises(ConfigError, match=words):
        jaxinfer.plan(str(config_json), "cpu-2", compile=False, **options)


def test_what_the_child_refuses_is_an_error(config_json, child):
    refusal = json.dumps(Plan("m", {}, {}, fits=False, failure="it cannot be", refused=True).fields())
    child(f"import sys; open(sys.argv[1], 'w').write({refusal!r})")
    with pytest.raises(ConfigError, match="it cannot be"):
        jaxinfer.plan(str(config_json), "cpu-2")
