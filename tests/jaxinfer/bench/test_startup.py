"""The start-up benchmark over an echoing engine. No times are judged."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from jaxinfer import __main__ as program
from jaxinfer.bench.startup import EVENT
from jaxinfer.config import EngineConfig
from jaxinfer.engine import engine as engine_module
from tests.fakes import FakeEngine, FakeInfo


@pytest.fixture
def engines(monkeypatch):
    """Engines made so far; `compiles`: what the next ones compile; with a bundle they have its settings."""
    made = SimpleNamespace(all=[], compiles=0, mosaic=False)

    class Engine(FakeEngine):
        def __init__(self, config=None, *, progress=None):
            super().__init__(info=FakeInfo(max_model_len=64))
            progress("read", 1, 1)
            for _ in range(made.compiles):
                jax.monitoring.record_event_duration_secs(EVENT, 0.1)
            jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", 0.1)
            kept = None if config.execution.bundle is None else SimpleNamespace(mosaic=made.mosaic)
            self.program = SimpleNamespace(source=SimpleNamespace(bundle=kept))
            self.config = replace(config, cache=replace(config.cache, page_size=16))
            made.all.append(self)

    monkeypatch.setattr(engine_module, "Engine", Engine)
    return made


def bench(capsys, *flags):
    code = program.main(["bench", "startup", "--json", *flags])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_start_with_compiling(engines, capsys):
    engines.compiles = 3
    code, (row,) = bench(capsys)
    assert code == 0 and row["row"] == "compiled" and row["compilations"] == 3 and row["after_weights_seconds"] <= row["ready_seconds"]
    assert engines.all[0].closed


@pytest.mark.parametrize(("compiles", "mosaic", "code"), [(0, False, 0), (1, False, 1), (1, True, 0), (2, True, 1)])
def test_a_start_from_a_bundle_compiles_nothing(engines, capsys, compiles, mosaic, code):
    engines.compiles, engines.mosaic = compiles, mosaic
    assert bench(capsys, "--bundle", "DIR")[0] == code


def test_the_same_settings_without_the_bundle_are_compared(engines, capsys):
    code, rows = bench(capsys, "--bundle", "DIR", "--compare")
    assert code == 0 and [row["row"] for row in rows] == ["bundle", "compiled"] and rows[1]["same_tokens"] is True
    assert [engine.config.execution.bundle for engine in engines.all] == ["DIR", None]
    assert [engine.config.cache.page_size for engine in engines.all] == [16, 16]
    assert len(engines.all[0].seen) == 4


def test_nothing_to_compare_with(engines, capsys):
    assert bench(capsys, "--compare")[0] == 2
    assert EngineConfig().execution.bundle is None and engines.all == []
