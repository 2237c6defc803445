"""Every goal is of a case that exists; judged on the cards they are for."""

import importlib
from types import SimpleNamespace

import pytest

from jaxinfer.bench import kernel_goals
from jaxinfer.bench.kernel_goals import Goal

DECODE = SimpleNamespace(name="decode_64x4096")


@pytest.mark.parametrize("op", kernel_goals.GOALS)
def test_bench_cases_and_goals_are_the_same(op):
    assert set(kernel_goals.GOALS[op]) == {case.name for case in importlib.import_module(f"pallas_kernels.{op}.cases").BENCH}


def test_a_goal_speaks():
    assert str(Goal("times_peer", least=1.0)) == "times_peer >= 1" and str(Goal("microseconds", most=8.0)) == "microseconds <= 8"
    assert Goal("microseconds", most=8.0).reached({"microseconds": 9}) is False
    assert Goal("times_peer", least=1.0).reached({"times_peer": 1.01}) is True
    assert Goal("times_peer", least=1.0).reached({"times_peer": None}) is None


@pytest.mark.parametrize(
    ("implementation", "device", "reached"),
    [("gpu", "NVIDIA H200", False), ("gpu", "NVIDIA H100 80GB HBM3", False), ("gpu", "NVIDIA B200", None), ("gpu", "cpu", None),
     ("xla", "NVIDIA H200", None), ("peer-cudnn", "NVIDIA H200", None)],
)  # fmt: skip
def test_judged_where_it_was_meant(implementation, device, reached):
    goal = kernel_goals.find("paged_attention", DECODE)
    found = kernel_goals.judge(goal, {"implementation": implementation, "share_of_bandwidth": 0.93}, device)
    assert found == {"goal": "share_of_bandwidth >= 0.94" if implementation == "gpu" else None, "reached": reached}


def test_no_goal_no_verdict():
    assert kernel_goals.find("quantized_matmul", DECODE) is None
    assert kernel_goals.judge(None, {"implementation": "gpu"}, "NVIDIA H200") == {"goal": None, "reached": None}
