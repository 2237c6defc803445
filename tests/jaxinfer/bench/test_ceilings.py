"""Ceilings are positive, and floors follow from them. No times are judged."""

from jaxinfer.bench import ceilings


def test_ceilings_of_this_machine(monkeypatch):
    monkeypatch.setattr(ceilings, "ROUNDS", 1)
    found = ceilings.measure("float32", megabytes=1, size=64)
    assert found.bandwidth > 0 and found.matmul > 0 and found.fields()["dtype"] == "float32"


def test_floors():
    ceiling = ceilings.Ceilings(bandwidth=2e9, matmul=4e12, dtype="bfloat16")
    assert ceiling.decode_floor(1e9) == 0.5 and ceiling.compute_floor(1e12) == 0.25
