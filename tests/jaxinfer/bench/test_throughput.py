"""The throughput benchmark over an echoing engine and a peer made of stubs."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest

from jaxinfer import __main__ as program
from jaxinfer.bench import throughput
from jaxinfer.bench.workloads import DEFAULT, GOALS, STATIC_BATCHES, Goal, Workload
from jaxinfer.engine import engine as engine_module
from tests.fakes import FakeEngine, FakeInfo
from tests.jaxinfer.bench import stubs


class Engine(FakeEngine):
    """An echo that knows whole prompts again under the same salt, and is slow without overlap."""

    made: ClassVar[list["Engine"]] = []

    def __init__(self, config, *, progress=None):
        super().__init__(info=FakeInfo(max_model_len=64), step_seconds=0.01 if config.execution.overlap == "off" else 0.0)
        self.config = config
        self.scheduler = SimpleNamespace(looked_up=0, reused=0)
        self.made.append(self)

    def add(self, request):
        known = (request.cache_salt, request.prompt) in {(other.cache_salt, other.prompt) for other in self.seen}
        super().add(request)
        self.scheduler.looked_up += len(request.prompt)
        self.scheduler.reused += known * len(request.prompt)


@pytest.fixture(autouse=True)
def made(monkeypatch):
    monkeypatch.setattr(Engine, "made", [])
    monkeypatch.setattr(engine_module, "Engine", Engine)
    return Engine.made


def run(capsys, *arguments):
    code = program.main(["bench", "throughput", "--json", "--repeat", "1", "--scale", "0.1", *arguments])
    captured = capsys.readouterr()
    return code, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_ours_alone(made, capsys):
    code, rows, _ = run(capsys)
    assert code == 0 and [row["workload"] for row in rows] == list(DEFAULT)
    assert all(row["side"] == "jaxinfer" and row["tokens_per_second"] > 0 and len(row["runs"]) == 1 for row in rows)
    assert all(row["variant"] == "as given" and row["kv_tokens"] == 4096 for row in rows)
    assert made[0].closed and all(request.params.stop.ignore_eos and request.params.greedy for request in made[0].seen)


def test_what_a_turn_computed_is_not_found_by_the_next(made, capsys):
    _, rows, _ = run(capsys, "--workload", "batch-16", "--repeat", "2")
    assert rows[0]["cached_share"] == 0.0
    salts = [request.cache_salt for request in made[0].seen]
    assert [len(set(salts[turn : turn + 16])) for turn in (0, 16, 32)] == [1, 1, 1] and len(set(salts)) == 3


def test_the_share_found_is_of_the_measured_turns(capsys, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda count: "always the same")
    _, rows, _ = run(capsys, "--workload", "batch-16")
    assert rows[0]["cached_share"] == 1.0  # the turn that warms up found nothing


def test_variants_are_measured_beside_the_engine_as_given(made, capsys):
    flags = (
        "--workload",
        "batch-1",
        "--workload",
        "mixed-64",
        "--beside",
        "overlap=off",
        "--beside",
        "page_size=64,overlap=on",
        "--repeat",
        "2",
    )
    code, rows, _ = run(capsys, *flags)
    names = ["as given", "overlap=off", "page-size=64,overlap=on"]
    assert code == 0 and [row["workload"] for row in rows] == ["batch-1"] * 5 + ["mixed-64"] * 5
    for group in (rows[:5], rows[5:]):
        assert [row["variant"] for row in group] == [*names, *names[1:]]
        assert [row["base"] for row in group[3:]] == ["as given"] * 2 and all(len(row["turns"]) == 2 for row in group[3:])
        assert group[3]["base_speedup"] == pytest.approx(group[1]["seconds"] / group[0]["seconds"])
    assert rows[3]["base_speedup"] > 3 * rows[4]["base_speedup"]  # one sleeps in every step, one is as fast as the base
    found = [(engine.config.execution.overlap, engine.config.cache.page_size) for engine in made]
    assert found == [("on", None), ("off", None), ("on", 64)] and all(engine.closed for engine in made)


def test_a_bad_variant_is_refused_before_anything_is_built(made, capsys):
    code, rows, err = run(capsys, "--beside", "overlap=off", "--beside", "overlop=off")
    assert (code, rows, made) == (2, [], []) and "--beside overlop=off: 'overlop' is no setting; there are: bundle," in err


def test_a_shape_is_random_weights_and_just_enough_context(made, capsys):
    run(capsys, "--shape", "llama-3.1-8b", "--workload", "batch-1", "--scale", "1", "--beside", "dtype=float16")
    models = [engine.config.model for engine in made]
    assert {(model.model, model.load_format, model.max_model_len) for model in models} == {("llama-3.1-8b", "random", 32 + 128)}
    run(capsys, "--shape", "tiny", "--workload", "batch-512")
    run(capsys, "--shape", "tiny", "--workload", "batch-1", "--max-model-len", "48")
    assert [engine.config.model.max_model_len for engine in made[2:]] == [256, 48]
    assert len(made[2].seen) == 2 * 512


def test_a_shape_has_no_weights_for_the_peer(made, capsys):
    code, rows, err = run(capsys, "--shape", "tiny", "--peer", sys.executable)
    assert (code, rows, made) == (2, [], []) and "--peer needs a checkpoint" in err


@pytest.mark.ci
def test_a_tiny_shape_really_runs(capsys, monkeypatch):
    monkeypatch.undo()
    small = ("--max-sequences", "2", "--max-step-tokens", "32", "--page-size", "16", "--compilation-cache", "on", "--max-model-len", "128")
    code, rows, _ = run(capsys, "--shape", "tiny", "--workload", "shared-64", "--beside", "prefix-caching=off", *small)
    base, without, ratio = rows
    assert code == 0 and base["model"] == "tiny" and base["requests"] == 64 and ratio["variant"] == "prefix-caching=off"
    assert 0.6 < base["cached_share"] < 0.8 and without["cached_share"] == 0.0  # tails are never found, not by a later turn either


@pytest.mark.parametrize(("goal", "code"), [(Goal(0.0, None), 0), (Goal(1e9, None), 1), (Goal(0.0, 1e9), 1)])
def test_beside_the_peer(capsys, monkeypatch, tmp_path, goal, code):
    monkeypatch.setenv("PYTHONPATH", str(stubs.install(tmp_path)))
    monkeypatch.setitem(GOALS, "mixed-64", goal)
    found, rows, _ = run(capsys, "--peer", sys.executable, "--workload", "mixed-64", "--model", str(tmp_path))
    assert found == code
    assert [(row["side"], row["dtype"], row.get("batch")) for row in rows[:-1]] == [
        ("jaxinfer", "float32", None), *(("peer", dtype, batch) for dtype in throughput.PEER_DTYPES for batch in STATIC_BATCHES)
    ]  # fmt: skip
    assert rows[-1]["reached"] is (code == 0) and rows[-1]["ratio_fastest"] <= rows[-1]["ratio_float32"]
    assert rows[1]["torch"] == "0" and rows[1]["output_tokens"] == rows[0]["output_tokens"]


@pytest.mark.parametrize("python", ["/no/such/python", "/bin/true"])
def test_a_peer_that_does_not_work_is_said(capsys, tmp_path, python):
    code, rows, err = run(capsys, "--peer", python, "--model", str(tmp_path))
    assert (code, rows) == (2, []) and f"--peer {python}" in err and "torch and transformers" in err


def test_what_the_peer_does_not_run_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(stubs.install(tmp_path)))
    code, rows, err = run(capsys, "--peer", sys.executable, "--workload", "batch-512", "--model", str(tmp_path))
    assert code == 0 and [row["side"] for row in rows] == ["jaxinfer"] and "batch-512 is measured without the peer" in err


def test_without_a_goal_any_ratio_will_do(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(stubs.install(tmp_path)))
    flags = ("--peer", sys.executable, "--workload", "shared-64", "--model", str(tmp_path), "--beside", "overlap=off")
    code, rows, _ = run(capsys, *flags)
    assert code == 0 and [row.get("side") for row in rows] == ["jaxinfer"] * 2 + ["peer"] * 4 + [None, None]
    assert rows[-2]["variant"] == "overlap=off" and (rows[-1]["goal_float32"], rows[-1]["reached"]) == (None, None)
    assert rows[-1]["ratio_float32"] == pytest.approx(min(row["seconds"] for row in rows[2:4]) / rows[0]["seconds"])


@pytest.mark.parametrize(("text", "output"), [("ERROR", 5), ("fine", 3)])
def test_a_sequence_with_another_count_is_an_error(made, text, output, monkeypatch):
    engine = Engine(throughput.EngineConfig())
    work = Workload("x", (tuple(engine.tokenizer.encode(text)),), (output,), (1,))
    if text == "fine":
        monkeypatch.setattr(engine, "_advance", lambda running: replace(FakeEngine._advance(engine, running), token_ids=(1, 2)))
    with pytest.raises(RuntimeError, match="x: a sequence did not get exactly its tokens"):
        throughput._run_ours(engine, work)
