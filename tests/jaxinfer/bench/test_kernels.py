"""The kernel benchmark measures every op it finds, and its peers. No times are judged."""

import argparse
import json

import pytest

from jaxinfer import __main__ as program
from jaxinfer.bench import ceilings, kernel_goals, kernel_peers, kernels
from jaxinfer.config import ConfigError
from pallas_kernels.costs import Cost
from pallas_kernels.paged_attention import cases as paged
from pallas_kernels.timing import Timing


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ceilings, "measure", lambda dtype: ceilings.Ceilings(1e9, 1e12, str(dtype)))


def run(capsys, *arguments, code=0):
    assert program.main(["bench", "kernels", "--json", "--repeat", "1", "--copies", "2", "--calls", "2", *arguments]) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def flags(**changes):
    return argparse.Namespace(**{"op": None, "implementation": None, "cases": "tuning", "case": None} | changes)


def test_a_kernel_that_donates_and_one_that_does_not(capsys):
    rows = run(
        capsys, "--cases", "tests", "--op", "paged_attention,quantized_matmul", "--case", "decode_one,one", "--implementation", "xla"
    )
    assert [(row["row"], row.get("op"), row.get("case")) for row in rows] == [
        ("ceiling", None, None), ("ceiling", None, None), ("kernel", "paged_attention", "decode_one"), ("kernel", "quantized_matmul", "one")
    ]  # fmt: skip
    assert rows[3]["bytes"] == 4 * 96 + 200 * 96 + 4 * 200 + 4 * 200 and rows[3]["microseconds"] > 0
    assert rows[3]["floor_microseconds"] == pytest.approx(rows[3]["bytes"] / 1e3)
    assert rows[3]["share_of_bandwidth"] == pytest.approx(rows[3]["floor_microseconds"] / rows[3]["microseconds"])
    assert rows[3]["operations"] == 2 * 96 * 200 and 1 <= rows[3]["calls_per_program"] <= 2


def test_everything_is_found_but_the_reference():
    jobs = list(kernels.work(flags()))
    assert {job.op for job in jobs} >= {"flash_attention", "paged_attention", "quantized_matmul"}
    assert "reference" not in {job.implementation for job in jobs} and "peer-cudnn" in {job.implementation for job in jobs}


def test_peers_go_before_ours():
    names = [job.implementation for job in kernels.work(flags(op=["flash_attention"], cases="bench", case=["full_1x4096_dim128"]))]
    assert names[:2] == ["peer-cudnn", "peer-torch-sdpa"] and "xla" in names[2:]
    assert {job.case.name for job in kernels.work(flags(op=["paged_attention"], cases="bench"))} == {case.name for case in paged.BENCH}
    assert list(kernels.work(flags(op=["quantized_matmul"], cases="bench"))) == []


def test_what_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="unknown op 'attention'; there are: dense_matmul, flash_attention"):
        list(kernels.work(flags(op=["attention"])))
    with pytest.raises(ConfigError, match="unknown case 'huge'"):
        list(kernels.work(flags(case=["huge"])))


def test_a_refused_case_is_left_out(capsys, monkeypatch):
    def refuse(*args):
        raise NotImplementedError("not this shape")

    monkeypatch.setattr(kernels, "_call", refuse)
    assert len(run(capsys, "--op", "quantized_matmul", "--case", "demo_one")) == 2


def test_what_a_peer_trips_over_is_said(capsys, monkeypatch):
    def trip(case, settings):
        raise RuntimeError("no engine\nfor this shape")

    monkeypatch.setattr(kernel_peers, "PEERS", {"quantized_matmul": {"peer": trip}})
    assert program.main(["bench", "kernels", "--op", "quantized_matmul", "--case", "demo_one", "--implementation", "peer"]) == 0
    assert "peer left out: no engine" in capsys.readouterr().err


def stub_job(implementation, seconds):
    cost = Cost(8 * 10**6, 10**9)
    return kernels.Job("paged_attention", paged.BENCH[-1], implementation, lambda settings: Timing([seconds], 1, 0.0, cost))


@pytest.mark.parametrize(("ours", "code"), [(2e-3, 0), (4e-3, 1)])
def test_ratios_and_goals(capsys, monkeypatch, ours, code):
    """A prefill whose goal is 0.92 of its own contiguous attention, on a card it is for."""
    jobs = [("peer-cudnn", 1e-3), ("contiguous-gpu", 2e-3), ("contiguous-xla", 9e-3), ("gpu", ours)]
    monkeypatch.setattr(kernels, "work", lambda args: iter([stub_job(*job) for job in jobs]))
    monkeypatch.setattr(kernel_goals, "CARDS", __import__("re").compile("cpu"))
    row = run(capsys, code=code)[-1]
    assert row["times_peer"] == pytest.approx(1e-3 / ours) and row["times_contiguous"] == pytest.approx(2e-3 / ours)
    assert row["goal"] == "times_contiguous >= 0.92" and row["reached"] is (code == 0)
    assert row["tflops"] == pytest.approx(1e-3 / ours) and row["share_of_bandwidth"] == pytest.approx(8e-3 / ours)
