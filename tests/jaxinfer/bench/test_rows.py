"""Rows say what they are worth: device, versions, commit; and print as JSON or as a table."""

import argparse
import json
import sys

from jaxinfer.bench import rows


def flags(*arguments):
    parser = argparse.ArgumentParser()
    rows.add_output_arguments(parser)
    return parser.parse_args(arguments)


def test_json_rows_are_stamped_and_appended(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jaxinfer", "bench", "load", "--out", "/somewhere/rows.jsonl", "--api-key", "sesame"])
    for _ in range(2):
        with rows.Report("throughput", flags("--json", "--out", str(tmp_path / "rows.jsonl"))) as report:
            report.add(workload="batch-1", seconds=0.25)
    out = capsys.readouterr().out
    assert out == (tmp_path / "rows.jsonl").read_text() and len(out.splitlines()) == 2
    row = json.loads(out.splitlines()[0])
    assert {"workload": "batch-1", "benchmark": "throughput", "device": "cpu"}.items() <= row.items()
    assert row["command"] == "jaxinfer bench load --api-key ***"
    assert set(rows.STAMP) <= set(row) and row["host"].endswith("cores")


def test_table_for_people(capsys):
    with rows.Report("x", flags(), device="H200") as report:
        report.add(side="ours", seconds=0.123456, runs=[1, 2])
        report.add(ratio=1.5, reached=True, goal=None)
        report.add(side="peer", seconds=12.0, runs=[3])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("device H200, host ")
    assert lines == ["side  seconds", "ours   0.1235", "peer       12", "", "ratio  reached  goal", "  1.5     True     -"]


def test_a_wide_table_is_turned():
    wide = {f"a_rather_long_name_{i}": i for i in range(8)}
    assert rows.table([wide, wide]).splitlines()[:2] == ["a_rather_long_name_0  0  0", "a_rather_long_name_1  1  1"]


def test_no_table_after_an_error(capsys):
    try:
        with rows.Report("x", flags(), device="cpu") as report:
            report.add(a=1)
            raise KeyError
    except KeyError:
        pass
    assert capsys.readouterr().out == ""


def test_a_busy_machine_is_said(monkeypatch, capsys):
    ticks = iter([(0, 0), (30, 100), (0, 0), (90, 100), None, None, (1, 1), (1, 1)])
    monkeypatch.setattr(rows, "_ticks", lambda: next(ticks))
    assert [rows.busy(0.0) for _ in range(4)] == [0.7, 0.1, None, None]
    assert capsys.readouterr().err.startswith("jaxinfer: other programs use 70% of the processors") and rows.BUSY > 0.1


def test_spread_is_the_median_with_all_runs():
    assert rows.spread([3.0, 1.0, 2.0]) == {"seconds": 2.0, "runs": [3.0, 1.0, 2.0]}


def test_outside_of_a_source_tree_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(rows.jaxinfer, "__file__", str(tmp_path / "jaxinfer" / "__init__.py"))
    assert rows.commit() is None
    (tmp_path / "jaxinfer").mkdir()
    assert rows.commit() is None
