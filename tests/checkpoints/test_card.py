"""The card's pieces come from reports alone."""

import json
from pathlib import Path

import pytest

from checkpoints import card


def report(skills: dict[str, float]) -> dict[str, object]:
    curve = [{"step": step, "prose": 7.0 / step, "chat": 6.0 / step, "draft": 7.0 / step, "seconds": 1.0} for step in range(1, 301)]
    table = {name: {"accuracy": value, "instances": 4, "failures": []} for name, value in skills.items()}
    samples = {"greedy": [{"prompt": "a|b", "reply": "c\n\nd"}]}
    return {"steps": 300, "tokens": 3000, "seconds": 9.87654321, "curve": curve, "skills": table, "samples": samples}


@pytest.mark.filterwarnings("default")
def test_reports_become_a_picture_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, skills in (("one", {"addition": 0.5}), ("two", {"addition": 0.75, "limits": 1.0})):
        (tmp_path / f"{name}.json").write_text(json.dumps(report(skills)))
    (tmp_path / "authors.json").write_text(json.dumps([["r", "f", "CC-BY; Ann, Bo"], ["r", "g", "CC-BY; Bo"], ["r", "h", ""]]))
    files = [str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    card.main([*files, "--attribution", str(tmp_path / "authors.json"), "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "| addition | 50.0% | 75.0% | 4 |" in shown and "| limits |  | 100.0% | 4 |" in shown
    assert "| a\\|b | c ¶ d |" in shown and "**CC-BY:** Ann, Bo (2)." in shown
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    stages = json.loads((tmp_path / "training.json").read_text())
    assert len(stages[0]["curve"]) <= card.KEPT_ROWS and stages[0]["seconds"] == 9.8765


def test_the_committed_card_says_what_was_measured():
    root = Path(card.__file__).parent
    text, stages = (root / "README.md").read_text(encoding="utf-8"), json.loads((root / "training.json").read_text())
    assert f"{stages[-1]['bits_per_byte']:.3f}" in text and card.tables(stages).split("\n\n")[0] in text
    assert (root / "loss.png").stat().st_size < 100_000
