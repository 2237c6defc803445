import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, tuning
from pallas_kernels.paged_attention import draws
from pallas_kernels.paged_attention.cases import SINKS, Case
from pallas_kernels.paged_attention.pool import QuantizedKV

CASE = Case(
    "x", 3, 2, 12, page_size=4, pages_per_row=4, group=2, head_dim=16, window=9, decode_tokens=2, kv_dtype="int8", extras=SINKS
)  # fmt: skip


@pytest.fixture(scope="module")
def step():
    """One that was played well."""
    return jax.jit(partial(draws.play, CASE, "xla"))(jnp.int32(3))


def judged(step):
    with jax.enable_x64(True):
        return draws.Checked(CASE, draws.judge(CASE, step))


def test_shapes_are_few_and_different():
    found = draws.shapes()
    assert len(set(found)) == len(found) <= 40
    assert {case.decode_tokens for case in found} == {1, 2, 4, 8} and {case.kv_dtype for case in found} == {None, "int8", "float8_e4m3fn"}


def test_sizes_given_by_name_are_what_is_traced(monkeypatch):
    """Those of the implementation with the given ones in their place; the first look at them ends the check."""
    seen = []

    def look(case, implementation, seed):
        seen.append(tuning.sizes("paged_attention", implementation, dispatch.target(), case.tuning_key()))
        raise LookupError("seen")

    monkeypatch.setattr(draws, "play", look)
    usual = tuning.sizes("paged_attention", "xla", dispatch.target(), CASE.tuning_key())
    name = next(iter(usual))
    for given in (draws._sizes(f"{name}=7"), None):
        with pytest.raises(LookupError, match="seen"):
            draws.check(CASE, "xla", jnp.arange(1), given)
    assert seen == [usual | {name: 7}, usual] != [usual, usual]


@pytest.mark.ci
def test_a_good_step_is_good(step):
    found = judged(step)
    assert found.good and str(found).endswith("ok")


@pytest.mark.ci
def test_each_fault_is_seen(step):
    """A wrong output, a step of the pool that is off, a page that somebody else changed, a row that its neighbours changed."""
    real = int(np.flatnonzero(np.asarray(step.mine))[0])
    metadata, positions = step.inputs["metadata"], np.asarray(step.inputs["positions"])
    row = int(np.argmax(np.asarray(metadata.query_starts) == real))
    page = int(metadata.page_tables[row, positions[real] // 4])
    place = page, 0, 0, int(positions[real]) % 4
    free = ~np.isin(np.arange(len(step.kv.values)), np.asarray(metadata.page_tables))
    other = int(np.flatnonzero(free)[0])
    faults = {
        "vector": step._replace(out=step.out.at[real, 0].multiply(1.2)),
        "written": step._replace(kv=QuantizedKV(step.kv.values, step.kv.scales.at[place].multiply(1.1))),
        "wrong": step._replace(kv=QuantizedKV(step.kv.values.at[other].set(1), step.kv.scales)),
        "alone": step._replace(alone=step.alone.at[real].add(1e-6)),
    }
    for name, fault in faults.items():
        found = judged(fault)
        assert not found.good, name
        assert name == "alone" or float(getattr(found.worst, name)) > float(getattr(judged(step).worst, name))


@pytest.mark.ci
def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(draws, "shapes", lambda: [dataclasses.replace(CASE, kv_dtype=None, name="first"), CASE])
    assert draws.main(["--implementation", "xla", "--draws", "2", "--only", "int8"]) == 0
    assert "2 draws, 0 of 1 shapes wrong" in capsys.readouterr().out
    assert draws.main(["--implementation", "gpu", "--draws", "2", "--only", "float32"]) == 1
    assert "NotImplementedError" in capsys.readouterr().out
