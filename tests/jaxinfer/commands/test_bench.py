"""`jaxinfer bench NAME` finds benchmarks in their folder."""

import pytest

from jaxinfer import __main__ as program
from jaxinfer.bench import latency
from jaxinfer.commands import bench


def test_benchmarks_are_found_and_can_run():
    found = bench.benchmarks()
    assert {"throughput", "latency", "kernels", "load"} <= set(found) and not bench.HELPERS & set(found)
    assert all(module.HELP and callable(module.run) for module in found.values())


def test_the_named_one_runs(monkeypatch):
    monkeypatch.setattr(latency, "run", lambda args: 0 if args.steps == 3 else 1)
    assert program.main(["bench", "latency", "--steps", "3"]) == 0


def test_an_unknown_name_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["bench", "latenci"])
    assert end.value.code == 2 and "throughput" in capsys.readouterr().err
