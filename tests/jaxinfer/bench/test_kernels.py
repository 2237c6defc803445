"""The kernel benchmark measures every op it finds. No times are judged."""

import argparse
import json

import pytest

from jaxinfer import __main__ as program
from jaxinfer.bench import ceilings, kernels


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(ceilings, "measure", lambda dtype: ceilings.Ceilings(1e9, 1e12, str(dtype)))


def run(capsys, *arguments):
    assert program.main(["bench", "kernels", "--json", "--repeat", "1", "--copies", "2", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_kernel_that_donates_and_one_that_does_not(capsys):
    rows = run(capsys, "--cases", "tests", "--case", "decode_one", "--case", "one", "--implementation", "xla")
    assert [(row["row"], row.get("op"), row.get("case")) for row in rows] == [
        ("ceiling", None, None), ("ceiling", None, None), ("kernel", "paged_attention", "decode_one"), ("kernel", "quantized_matmul", "one")
    ]  # fmt: skip
    assert rows[3]["bytes"] == 4 * 96 + 200 * 96 + 4 * 200 + 4 * 200 and rows[3]["microseconds"] > 0
    assert rows[3]["floor_microseconds"] == pytest.approx(rows[3]["bytes"] / 1e3)


def test_everything_is_found_but_the_reference():
    flags = argparse.Namespace(op=None, implementation=None, cases="tuning", case=None)
    jobs = list(kernels._work(flags))
    assert {job.op for job in jobs} >= {"flash_attention", "paged_attention", "quantized_matmul"}
    assert "reference" not in {job.implementation for job in jobs}


def test_a_refused_case_is_left_out(capsys, monkeypatch):
    def refuse(*args):
        raise NotImplementedError("not this shape")

    monkeypatch.setattr(kernels, "_measure", refuse)
    assert len(run(capsys, "--op", "quantized_matmul")) == 2
