"""A run from prompts to a folder; killed on its way it goes on and ends with the same bits."""

import json
import re
from dataclasses import replace

import pytest

from jaxinfer import prompts
from jaxinfer.checkpoint import manifest
from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.config import ConfigError, MeshShape
from jaxinfer.train import answers, distill
from jaxinfer.train.acceptance import Acceptance, Examiner
from jaxinfer.train.answers import Texts, Wanted
from jaxinfer.train.distill import Clock, Data, Settings
from jaxinfer.train.learner import Learner, Recipe
from tests.jaxinfer.train.conftest import make_texts

STEPS = 12  # as the shared step


class Killed(BaseException):
    """What no code catches."""


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "abc" * n}) for n in range(1, 5)))
    return Data(prompts.read(path))


@pytest.fixture
def asked(monkeypatch):
    """The target's answers are there already."""
    found = []

    def make(config, asked, wanted, progress):
        found.append(config)
        held = tuple(text._replace(temperature=0.0) for text in make_texts(2, seed=9))
        return Texts(tuple(make_texts(6)), held)

    monkeypatch.setattr(answers, "make", make)
    return found


def settings_of(target, small, out):
    recipe = Recipe(steps=STEPS, rows=2, learning_rate=0.02)
    return Settings(str(target), str(small), out, out.with_name(out.name + ".state"), recipe=recipe, max_model_len=40, save_seconds=0.0)


def stamp():
    return {"device": "here"}


def measured(weights):
    """A figure that follows from the weights."""
    return Acceptance(0.0, float(abs(weights["norm.weight"]).mean()), 1, (0.5,) * 4, 1)


@pytest.mark.parametrize("whole", ["", pytest.param("whole", marks=pytest.mark.ci)], ids=["shared step", "whole"])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(target, small, lines, asked, tmp_path, monkeypatch, school, whole):
    """Nothing is compiled again; or, at length, everything."""
    if not whole:
        step = school.step
        monkeypatch.setattr(Learner, "compiled", lambda self, leaves, state: step)
        monkeypatch.setattr(Examiner, "measure", lambda self, leaves, weights, texts: [measured(weights)])
    settings, reports = settings_of(target, small, tmp_path / "out"), []

    def killing(stage, done, total):
        if (stage, done) == ("learn", 3):  # the state of the second step is kept
            raise Killed

    with pytest.raises(Killed):
        distill.distill(settings, lines, stamp, killing)
    assert not settings.out.exists() and (settings.state / "step-00000002").is_dir()
    with pytest.raises(CheckpointError, match="another recipe was begun here"):
        distill.distill(replace(settings, recipe=replace(settings.recipe, steps=99)), lines, stamp, killing)
    resumed = distill.distill(replace(settings, save_seconds=60.0), lines, stamp, lambda *report: reports.append(report))
    assert [report[1] for report in reports if report[0] == "learn"] == [*range(3, STEPS + 1)] and len(asked) == 1
    straight = distill.distill(
        replace(settings, out=tmp_path / "straight", state=tmp_path / "state", save_seconds=60.0), lines, stamp, lambda *_: None
    )
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert all(resumed[name] == straight[name] for name in ("loss", "before", "after"))
    assert whole or resumed["before"] != resumed["after"]  # a figure of so few drafts may stay as it was
    manifest.verify(tmp_path / "out", weights=True)
    manifest.verify(tmp_path / "out", weights=False)
    kept = json.loads((tmp_path / "out" / distill.FIGURES).read_text())
    assert kept == json.loads(json.dumps(resumed)) and kept["loss"][-1] < kept["loss"][0] and kept["device"] == "here"
    assert not settings.state.exists()
    assert (tmp_path / "out" / distill.PAGE).read_text().startswith("<!doctype html>")
    with pytest.raises(CheckpointError, match="--overwrite"):
        distill.distill(settings, lines, stamp, lambda *_: None)


def test_rows_are_dealt_out_evenly(target, small, tmp_path):
    with pytest.raises(ConfigError, match=re.escape("--batch 2 rows do not divide over 4 replicas")):
        replace(settings_of(target, small, tmp_path / "out"), mesh=MeshShape(data=4))


def test_one_line_is_not_enough(target, small, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "a"}')
    settings = replace(settings_of(target, small, tmp_path / "out"), wanted=Wanted())
    with pytest.raises(ConfigError, match="at least two are needed"):
        distill.distill(settings, Data(prompts.read(tmp_path / "one.jsonl")), stamp, lambda *_: None)


def test_the_share_that_is_done_is_that_of_steps_or_of_time(monkeypatch):
    now = [5.0]
    monkeypatch.setattr(distill.time, "monotonic", lambda: now[0])
    assert Clock(Recipe(steps=8), 3.0).started().done(2) == 0.25
    clock = Clock(Recipe(steps=8, seconds=10.0), 3.0).started()
    now[0] += 4
    assert (clock.done(1), clock.done(6), clock.spent) == (0.7, 0.75, 7.0)
    now[0] += 4
    assert clock.done(1) > 1


def test_the_answers_of_another_draft_are_taken(target, small, lines, asked, tmp_path, monkeypatch, school):
    step = school.step
    monkeypatch.setattr(Learner, "compiled", lambda self, leaves, state: step)
    monkeypatch.setattr(Examiner, "measure", lambda self, leaves, weights, texts: [measured(weights)])
    held = lines._replace(held_out=lines.lines)
    settings = replace(settings_of(target, small, tmp_path / "one"), answers=tmp_path / "answers.json")
    data = []
    for learn in ("completion", "all"):
        named = replace(settings, out=tmp_path / learn, state=tmp_path / "state", save_seconds=60.0, wanted=Wanted(learn=learn))
        data.append(distill.distill(named, held, stamp, lambda *_: None)["data"])
    assert data[0]["measured_on"] == "lines.jsonl" and data[1]["learned_tokens"] == data[0]["learned_tokens"] + 2 * 6
    assert len(asked) == 1 and settings.answers.is_file()
    with pytest.raises(CheckpointError, match="made with another data;"):
        distill.distill(replace(settings, out=tmp_path / "third"), lines, stamp, lambda *_: None)
