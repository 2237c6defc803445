"""R14 kills converters and sees what is no whole tree."""

import argparse
import random
import subprocess

import pytest

from jaxinfer.checkpoint import convert
from jaxinfer.models.graph import Quantization
from jaxinfer.selftest import r14
from tests.quantised_files import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("r14") / "model")


class Dead:
    """A converter that was killed: it leaves what `leave` writes."""

    def __init__(self, leave):
        self.leave, self.stdout = leave, self

    def __call__(self, command, **_):
        self.leave(r14.Path(command[-1]))
        return self

    def readline(self):
        return r14.READY + "\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def kill(self):
        pass


def checked(model, leave, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Dead(leave))
    monkeypatch.setattr(r14, "SPAN", 0.0)
    return r14.check(str(model), 1, random.Random(0), tmp_path)


def test_trees_that_are_whole_and_others(model, tmp_path, monkeypatch):
    def convert_by(recipe):
        return lambda target: convert.convert(model, target, Quantization.parse(recipe.scheme), kind=recipe.kind, overwrite=True)

    for recipe in r14.RECIPES:
        verdict = checked(model, convert_by(recipe), tmp_path, monkeypatch)
        assert verdict.passed and verdict.counts[f"whole: {recipe.scheme}"] == 1
    for spoil in (
        lambda target: (target / "config.json").write_text("{}"),
        lambda target: (target / "more.safetensors").write_bytes(b""),
        lambda target: (target / "model.safetensors").unlink(),
        lambda target: (target / "jaxinfer_manifest.json").unlink(),
    ):
        convert_by(r14.RECIPES[0])(tmp_path / "model")
        verdict = checked(model, spoil, tmp_path, monkeypatch)
        assert not verdict.passed and verdict.counts["faults"] == 1


def test_a_converter_that_does_not_convert_is_an_error(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Dead, "readline", lambda self: "")
    monkeypatch.setattr(Dead, "wait", lambda self: 2, raising=False)
    with pytest.raises(RuntimeError, match="ended with 2 before it had converted once"):
        checked(model, lambda target: None, tmp_path, monkeypatch)


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.ci)])
def test_it_holds(kills, model, tmp_path):
    parser = argparse.ArgumentParser()
    r14.add_arguments(parser)
    args = parser.parse_args(["--model", str(model), "--kills", str(kills)])
    verdict = r14.run(argparse.Namespace(**vars(args), quick=True, seed=1))
    assert verdict.passed, verdict.counts
    assert verdict.counts["kills"] == kills
