"""The throughput benchmark over an echoing engine and a peer made of stubs."""

import json
import sys

import pytest

from jaxinfer import __main__ as program
from jaxinfer.api import LLM
from jaxinfer.bench import throughput
from jaxinfer.bench.throughput import GOALS, Goal, workloads
from tests.fakes import FakeEngine, FakeInfo
from tests.jaxinfer.bench import stubs


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    fake = FakeEngine(info=FakeInfo(max_model_len=64))
    monkeypatch.setattr(LLM, "build", lambda config, *, progress=None: LLM.over(fake))
    return fake


def run(capsys, *arguments):
    code = program.main(["bench", "throughput", "--json", "--repeat", "1", "--scale", "0.1", *arguments])
    captured = capsys.readouterr()
    return code, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_workloads_are_fixed_and_fit():
    full = workloads(8192, 2048)
    assert [work.name for work in full] == list(GOALS) and full == workloads(8192, 2048)
    assert [(len(work.prompts), work.tokens) for work in full[:2]] == [(1, 128), (16, 2048)]
    assert len(set(map(len, full[2].prompts))) > 30 and len(set(full[2].outputs)) > 30
    for work in workloads(8192, 64):
        assert all(len(prompt) + count <= 64 for prompt, count in zip(work.prompts, work.outputs, strict=True))


def test_ours_alone(engine, capsys):
    code, rows, _ = run(capsys)
    assert code == 0 and [row["workload"] for row in rows] == list(GOALS)
    assert all(row["side"] == "jaxinfer" and row["tokens_per_second"] > 0 and len(row["runs"]) == 1 for row in rows)
    assert all(request.params.stop.ignore_eos and request.params.greedy for request in engine.seen)


@pytest.mark.parametrize(("goal", "code"), [(Goal(0.0, None), 0), (Goal(1e9, None), 1), (Goal(0.0, 1e9), 1)])
def test_beside_the_peer(capsys, monkeypatch, tmp_path, goal, code):
    monkeypatch.setenv("PYTHONPATH", str(stubs.install(tmp_path)))
    monkeypatch.setitem(GOALS, "mixed-64", goal)
    found, rows, _ = run(capsys, "--peer", sys.executable, "--workload", "mixed-64", "--model", str(tmp_path))
    assert found == code
    assert [(row["side"], row["dtype"], row.get("batch")) for row in rows[:-1]] == [
        ("jaxinfer", "float32", None), *(("peer", dtype, batch) for dtype in throughput.PEER_DTYPES for batch in throughput.STATIC_BATCHES)
    ]  # fmt: skip
    assert rows[-1]["reached"] is (code == 0) and rows[-1]["ratio_fastest"] <= rows[-1]["ratio_float32"]
    assert rows[1]["torch"] == "0" and rows[1]["output_tokens"] == rows[0]["output_tokens"]


@pytest.mark.parametrize("python", ["/no/such/python", "/bin/true"])
def test_a_peer_that_does_not_work_is_said(capsys, tmp_path, python):
    code, rows, err = run(capsys, "--peer", python, "--model", str(tmp_path))
    assert (code, rows) == (2, []) and f"--peer {python}" in err and "torch and transformers" in err


def test_a_short_sequence_is_an_error(engine):
    engine.hang = False
    work = throughput.Workload("x", (tuple(engine.tokenizer.encode("ERROR")),), (5,), (1,))
    with pytest.raises(RuntimeError, match="ended before it had its tokens"):
        throughput._run_ours(LLM.over(engine), work)
