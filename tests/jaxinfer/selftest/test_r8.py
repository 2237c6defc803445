"""R8 hears compiles: none while requests run, and a planted one."""

import argparse

import jax
import numpy as np
import pytest

from jaxinfer.selftest import r8, stand


def args(*given):
    parser = argparse.ArgumentParser()
    r8.add_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args(given)), quick=True, seed=0)


def test_it_holds(tested):
    verdict = r8.check(tested, 12, 0)
    assert verdict.passed, verdict.counts
    assert verdict.counts["requests"] >= 12 and verdict.counts["listener_works"]


def test_a_compile_is_heard(tested, monkeypatch):
    step = tested.engine.step

    def traced():
        jax.jit(lambda x: x * len(outputs))(np.float32(2))
        return outputs

    outputs = []
    monkeypatch.setattr(tested.engine, "step", lambda: [*traced(), *step()])
    verdict = r8.check(tested, 2, 0)
    assert not verdict.passed and verdict.counts["compiles"] > 0


@pytest.mark.parametrize("misses", [0, 3])
def test_a_warm_start_must_not_miss(misses, monkeypatch, tested):
    starts = iter([{"cache_misses": 9}, {"cache_misses": misses}])
    monkeypatch.setattr(r8, "_start_process", lambda config, folder: next(starts))
    monkeypatch.setattr(stand, "build", lambda values: tested)
    verdict = r8.run(args("--requests", "2"))
    assert verdict.passed == (misses == 0)
    assert verdict.counts["starts"]["cold"]["cache_misses"] == 9 and verdict.counts["starts"]["warm"]["process_seconds"] >= 0


def test_a_start_tells_its_time(monkeypatch, tested):
    monkeypatch.setattr(stand, "build", lambda values: tested)
    assert set(r8.run(args("--start-only")).counts) == {"ready_seconds", "cache_misses", "programs"}


def test_a_start_is_a_process_that_may_fail(monkeypatch, tmp_path):
    monkeypatch.setattr(stand, "flags", lambda config: ["--page-size", "5"])
    with pytest.raises(RuntimeError, match="not a power of two"):
        r8._start_process(stand.settings({}), str(tmp_path))
