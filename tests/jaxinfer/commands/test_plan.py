"""`jaxinfer plan`: flags, exit codes, JSON."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from jaxinfer import __main__ as program
from jaxinfer.planner import planning
from jaxinfer.planner.outcome import Plan
from tests.jaxinfer.conftest import CONFIG


@pytest.fixture
def asked(monkeypatch):
    """What the planner is asked for; it answers that v5e-8 does not fit."""
    calls = []

    def run(model, slice, wanted, settings, progress=None):
        calls.append((model, slice, wanted, settings))
        refused = slice == "v9"
        failure = "no such slice" if refused else "died" if slice == "v5p-8" else None
        return Plan(model, {"slice": slice}, {}, fits=slice == "v6e-4", failure=failure or "shown as is", refused=refused)

    monkeypatch.setattr(planning, "run", run)
    return calls


def test_flags_reach_the_planner(asked, capsys):
    flags = "--model llama-3.1-8b --slice v6e-4 --goal latency --context 8k --concurrency 64 --quantize int8 --kv int8 --price 2.7 --json"
    assert program.main(["plan", *flags.split(), "--mesh", "tensor=4", "--no-compile"]) == 0
    model, slice, wanted, settings = asked[0]
    assert (model, slice, settings) == ("llama-3.1-8b", "v6e-4", {"quantize": "int8", "kv_dtype": "int8"})
    assert (wanted.context, wanted.concurrency, wanted.goal, wanted.price, wanted.mesh, wanted.compile) == (
        8192,
        64,
        "latency",
        2.7,
        (1, 4),
        False,
    )
    assert json.loads(capsys.readouterr().out)["fits"] is True


def test_a_bundle_is_of_one_slice(asked, capsys):
    assert program.main(["plan", "--slice", "v6e-4", "--bundle", "DIR", "--autotune", "FILE", "--json"]) == 0
    _, _, wanted, settings = asked[0]
    assert (wanted.bundle, wanted.autotune, settings) == ("DIR", "FILE", {})
    assert program.main(["plan", "--slice", "v6e-4,v5e-8", "--bundle", "DIR"]) == 2
    assert "--bundle DIR holds programs for one slice; --slice names 2" in capsys.readouterr().err and len(asked) == 1


def test_exit_codes(asked, capsys):
    assert program.main(["plan", "--slice", "v6e-4", "--json"]) == 0
    assert program.main(["plan", "--slice", "v5e-8", "--json"]) == 1
    assert program.main(["plan", "--slice", "v6e-4,v5p-8"]) == 1
    assert program.main(["plan", "--slice", "v9"]) == 2
    assert "error: no such slice" in capsys.readouterr().err
    assert [slice for _, slice, *_ in asked] == ["v6e-4", "v5e-8", "v6e-4", "v5p-8", "v9"]


def test_bad_flags(capsys):
    assert program.main(["plan", "--slice", "v9-8"]) == 2
    assert "write for example v5e-8" in capsys.readouterr().err
    for flags in (["--slice", "v6e-4", "--context", "long"], []):
        with pytest.raises(SystemExit) as end:
            program.main(["plan", *flags])
        assert end.value.code == 2
    assert "'long' is not a count" in capsys.readouterr().err


@pytest.mark.ci
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(("slice", "shards"), [("v5e-8", 2), ("v6e-4", 2)])
def test_a_tiny_model_compiles_for_a_tpu_that_is_not_there(tmp_path, slice, shards):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, "head_dim": 64, "hidden_size": 128}))
    devices = int(slice.partition("-")[2])
    flags = f"--slice {slice} --mesh data={devices // shards},tensor={shards} --context 64 --concurrency 8 --max-step-tokens 32 --json"
    command = [sys.executable, "-m", "jaxinfer", "plan", "--model", str(path), *flags.split()]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert ran.returncode == 0, ran.stderr
    plan = json.loads(ran.stdout)
    decode = next(row for row in plan["programs"]["compiled"] if "prefill" not in row["name"] and "sample" not in row["name"])
    sums = [each for each in decode["collectives"] if each["kind"] == "all-reduce"]
    assert sum(each["count"] for each in sums) == 2 * CONFIG["num_hidden_layers"] + 1
    assert plan["memory"]["programs_code"] > 0
