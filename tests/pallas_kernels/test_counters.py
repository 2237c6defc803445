from types import SimpleNamespace

import jax
import pytest

import pallas_kernels
from pallas_kernels import counters, dispatch
from pallas_kernels.dispatch import Target


def test_nothing_counts_on_a_cpu():
    assert pallas_kernels.shared_counters is counters.shared_counters
    assert counters.shared_counters() is None


@pytest.mark.parametrize(("device", "there"), [("NVIDIA H200", True), ("NVIDIA A100", False)])
def test_kernels_for_hopper_count(monkeypatch, device, there):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setattr(dispatch, "target", lambda: Target("gpu", device))
    assert (counters.shared_counters() is not None) is there


def test_a_case_gets_counters_if_its_op_takes_any(monkeypatch):
    monkeypatch.setattr(counters, "shared_counters", lambda: "made")
    takes = SimpleNamespace(counted=lambda inputs, found: inputs | {"counters": found})
    assert counters.counted(takes, {"x": 1}) == {"x": 1, "counters": "made"}
    assert counters.counted(SimpleNamespace(), {"x": 1}) == {"x": 1}
