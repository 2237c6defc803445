"""Plans for people: every part is there, no line is wider than the terminal."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from jaxinfer.planner import text, topology
from jaxinfer.planner.outcome import Plan
from tests.jaxinfer.planner.conftest import planned


def shown(show, subject, width=100):
    out = io.StringIO()
    show(subject, Console(file=out, width=width, highlight=False))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_plan_that_fits(meshed_plan, width):
    out = shown(text.show, meshed_plan, width)
    words = (
        "small on cpu-4: FITS",
        "weights",
        "KV pool",
        "sequences of full length",
        "bound by",
        "TTFT",
        "generated tokens/s",
        "all-reduce",
    )
    assert all(word in out for word in words), out
    assert "USD" in out and meshed_plan.command in out and "(--all)" in out
    tables = [line for line in out.splitlines() if "jaxinfer.serve" not in line]
    assert max(map(len, tables)) <= width


def test_a_bundle_is_said_to_be_there(meshed_plan):
    made = {"folder": "DIR", "programs": 27, "bytes": 3 << 20, "kv_tokens": 4096}
    out = shown(text.show, replace(meshed_plan, programs={**meshed_plan.programs, "bundle": made}))
    assert "bundle in DIR: 27 programs, 3.0 MiB, KV pool of 4,096 tokens a replica" in out


def test_meshes_are_compared():
    out = shown(text.show, planned())
    assert "data x tensor" in out and "2 x 2 *" in out and "a guess: not compiled" in out


def test_a_plan_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(topology.devices, "memory_bytes", lambda device: 245_000)
    plan = planned("cpu-1")
    out = shown(text.show, plan)
    assert "DOES NOT FIT: " in out and "GiB a device too much" in out and "What would make it fit:" in out and "jaxinfer.serve" not in out


def test_a_failure_is_said():
    dead = Plan("small", {"slice": "v5e-8"}, {}, fits=False, failure="the process died [signal 6]")
    assert shown(text.show, dead) == "small on v5e-8: FAILED\nthe process died [signal 6]\n"


def test_slices_side_by_side(meshed_plan):
    dead = Plan("small", {"slice": "v5e-8"}, {}, fits=False, failure="it died")
    for goal in ("throughput", "latency", "cost"):
        plan = Plan(**{**meshed_plan.fields(), "settings": {**meshed_plan.settings, "goal": goal}})
        out = shown(text.compare, [dead, plan])
        assert out.index("cpu-4") < out.index("v5e-8") and "failed" in out
