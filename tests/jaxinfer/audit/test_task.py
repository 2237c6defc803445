"""The user's own command: what it gets, what it may print, and how it can fail."""

import sys

import pytest

from jaxinfer.audit import task
from jaxinfer.audit.task import Metric
from jaxinfer.config import ConfigError

RECORDS = [{"prompt": "p", "completion": "4", "output": "4"}, {"prompt": "q ü", "completion": None, "output": "5"}]


def metric(tmp_path, code):
    script = tmp_path / "with space.py"
    script.write_text(f"import json, sys\nlines = [json.loads(line) for line in sys.stdin]\n{code}\n")
    return Metric.of(f"{sys.executable} '{script}'")


def test_one_number_for_each_line(tmp_path):
    found = metric(tmp_path, "for line in lines: print(int(line['completion'] == line['output']))")(RECORDS)
    assert found == (1.0, 0.0)
    assert task.score(found, (1.0, 1.0)) == task.Score(0.5, 0.5)


def test_one_number_for_all(tmp_path):
    found = metric(tmp_path, "print(len(lines[1]['prompt']) / 10)")(RECORDS)
    assert found == (0.3,) and task.score(found, found) == task.Score(0.3)


def test_no_shell_reads_it(tmp_path):
    marker = tmp_path / "made by a shell"
    made = Metric.of(f"{sys.executable} -c 'print(1)' > '{marker}'")
    assert made(RECORDS) == (1.0,) and not marker.exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("sys.exit(3)", "exit code 3"),
        ("print('good')", "could not convert .*; it must print one number"),
        ("print(1, 2, 3)", "printed 3 numbers for 2 lines"),
        ("print('nan')", "not finite"),
        ("pass", "printed 0 numbers"),
    ],
)
def test_commands_that_fail(tmp_path, code, said):
    with pytest.raises(ConfigError, match=said):
        metric(tmp_path, code)(RECORDS)


@pytest.mark.parametrize(("text", "said"), [("", "no such program"), ("no-such-program-here", "no such program"), ("a 'b", "No closing")])
def test_commands_that_cannot_be(text, said):
    with pytest.raises(ConfigError, match=said):
        Metric.of(text)
