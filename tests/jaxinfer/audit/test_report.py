"""The report as JSON, as rows of a table and in sentences."""

import json
import math
from dataclasses import replace

import pytest

from jaxinfer.audit import report, session
from jaxinfer.audit.report import Data, Report
from jaxinfer.audit.statistics import Estimate
from jaxinfer.audit.task import Score


@pytest.fixture
def made(basis, judged):
    data = Data("lines.jsonl", "ab" * 32, 3, 2, judged[0].divergence.tokens, 7, 40)
    plain = replace(session.reference(basis, judged[1], 64), task=Score(0.5))
    scheme = replace(judged[0], task=Score(0.25, 0.75))
    return Report("tiny", "float32", 0.02, data, plain, (scheme,), {"fp9": "no such device"}, {"device": "cpu"})


def test_json_has_everything_and_no_nan(made):
    broken = replace(made.schemes[0], within=False, divergence=replace(made.schemes[0].divergence, p99=math.nan))
    found = json.loads(json.dumps(replace(made, schemes=(broken,)).as_json(), allow_nan=False))
    assert found["within"] is False and found["schemes"][0]["divergence"]["p99"] is None
    assert found["reference"]["sizes"]["weights"] > found["schemes"][0]["sizes"]["weights"]
    assert found["schemes"][0]["worst"][0]["reference"][0].keys() == {"text", "probability"}
    assert found["schemes"][0]["divergence"]["places"][0].keys() == {"low", "high", "tokens", "mean"}


def test_rows_have_a_cell_for_every_model(made):
    rows = report.rows(made)
    assert rows[0] == ["", "unquantised", "int8"] and {len(row) for row in rows} == {3}
    cells = {row[0]: row[1:] for row in rows[1:]}
    assert cells["your metric"] == ["0.5", "0.25"] and cells["your metric, documents equal"] == ["", "75.0 %"]
    assert cells["mean KL within 0.02"][1] in ("yes", "NO") and "x" in cells["tokens/s (its own reference's)"][1]
    bare = replace(made, reference=replace(made.reference, task=None), schemes=(replace(made.schemes[0], task=None, speed=None),))
    assert not {"your metric", "tokens/s (its own reference's)"} & {row[0] for row in report.rows(bare)}


def test_notes_say_what_was_scored_cut_and_left_out(made):
    notes = " ".join(made.notes())
    assert "own greedy continuation" in notes and "over the whole vocabulary" in notes
    assert "7 tokens of completions did not fit" in notes and "fp9 was left out: no such device" in notes
    assert "mean little" not in notes and "50 % of the processors" in " ".join(replace(made, stamp={"host_busy": 0.5}).notes())
    assert "did not fit" not in " ".join(replace(made, data=replace(made.data, cut=0)).notes())


def test_the_worst_token_of_each_scheme_is_shown_in_its_context(made):
    worst = made.schemes[0].worst[0]
    (line,) = made.contexts()
    assert line.startswith("worst of int8: KL ") and f"token {worst.position} of line {worst.line}" in line
    assert repr(worst.context[-60:]) in line and repr(worst.token) in line and repr(worst.other[0].text) in line


def test_the_verdict_names_what_is_over(made):
    good, bad = replace(made.schemes[0], within=True), replace(made.schemes[0], name="int4", within=False)
    both, one = replace(made, schemes=(good, bad)), replace(made, schemes=(good,))
    assert not both.within and both.verdict() == "over a mean KL of 0.02 nats per token: int4"
    assert one.within and one.verdict() == "every scheme is within a mean KL of 0.02 nats per token"


def test_figures_are_written_for_people():
    assert [report.number(value) for value in (0.00012345, 12.345, 12345.6, math.inf)] == ["0.000123", "12.3", "12,346", "not finite"]
    assert report.interval(Estimate(1.0, 0.5, 1.5)) == "1 [0.5, 1.5]" and report.interval(Estimate(1.0)) == "1"
    assert report.percent(0.125) == "12.5 %" and report.percent(0.125, 0) == "12 %"
