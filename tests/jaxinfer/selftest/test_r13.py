"""R13 finds silent loads, unclear messages and dead processes, and the loader passes it."""

import argparse
import os
import random
import shutil
import signal
import subprocess
from functools import partial

import pytest

from jaxinfer.checkpoint import convert, manifest
from jaxinfer.models.graph import Quantization
from jaxinfer.selftest import damage, r13
from jaxinfer.selftest.r13 import Result
from tests.quantised_files import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("r13") / "model")


def arguments(model, *given):
    parser = argparse.ArgumentParser()
    r13.add_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args(["--model", str(model), *given])), seed=3)


@pytest.mark.parametrize("cases", [8, pytest.param(2 * len(damage.CASES), marks=pytest.mark.ci)])
def test_every_damage_ends_in_a_clear_error(cases, model):
    verdict = r13.run(argparse.Namespace(**vars(arguments(model, "--cases", str(cases))), quick=True))
    assert verdict.passed, verdict.counts
    assert verdict.counts["cases"] == cases and verdict.counts["good"] > 0.8 * cases


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    """A whole int8 folder with a manifest."""
    folder = tmp_path_factory.mktemp("base") / "int8"
    convert.convert(model, folder, Quantization.parse("int8"))
    return folder


@pytest.mark.parametrize(
    ("plant", "end"),
    [
        (lambda patch: patch.setattr(manifest, "verify", lambda *_, **__: None), "silent"),
        (lambda patch: patch.setattr(manifest, "_check", lambda *_, **__: 1 // 0), "broke"),
        (lambda patch: patch.setattr(manifest, "verify", partial(manifest.verify, remedy="two\nlines")), "unclear"),
    ],
)  # fmt: skip
def test_faults_are_seen(plant, end, base, tmp_path, monkeypatch):
    broken = shutil.copytree(base, tmp_path / "broken")
    case = next(it for it in damage.CASES if it.name == "bit of the weights")
    changed, whole = case.damage(broken, random.Random(1)), r13.state(base)
    assert r13.judge(case, "int8+", broken, changed, whole).end == "good"
    plant(monkeypatch)
    assert r13.judge(case, "int8+", broken, changed, whole).end == end


def test_a_worker_that_dies_is_counted(model, monkeypatch):
    starts = []

    class Worker:
        def __init__(self, command, **_):
            starts.append(command[command.index("--worker") + 1])
            self.stdout = ['["a", "b", "good", ""]\n'] * (2 if len(starts) == 1 else 7)
            self.returncode = -signal.SIGBUS if len(starts) == 1 else 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(subprocess, "Popen", Worker)
    results = r13.supervise(arguments(model), 10)
    assert starts == ["0", "3"] and [it.end for it in results].count("signal") == 1 and len(results) == 10
    verdict = r13.verdict(results)
    assert not verdict.passed and verdict.counts["signal"] == 1 and "-7" in verdict.counts["first_faults"][0]["message"]
    assert not r13.verdict([]).passed and r13.verdict([Result("a", "b", "harmless", "")]).passed


@pytest.mark.ci
def test_the_command_line_says_it_in_one_line(model):
    os.truncate(model / "model.safetensors", 100)
    assert r13.by_command(damage.CASES[0], "sharded", model).end == "good"
