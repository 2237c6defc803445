"""`jaxinfer distill`: flags become settings, bad lines are named, and what came of it is shown."""

import json

import pytest

from jaxinfer import __main__ as program
from jaxinfer.commands import distill as command
from jaxinfer.config import MeshShape
from jaxinfer.train import distill

BEFORE = {
    "temperature": 0.0, "agreement": 0.4, "tokens_compared": 1234, "stand": [0.4, 0.2, 0.1, 0.05], "places": 100, "tokens_per_step": 1.75,
}  # fmt: skip
FIGURES = {"target": "demo", "before": [BEFORE], "after": [BEFORE | {"temperature": 0.7, "agreement": 0.61, "tokens_per_step": 2.2}]}


def run(*flags):
    return program.main(["distill", *map(str, flags)])


@pytest.fixture
def data(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "completion": "c"}\n')
    return tmp_path / "lines.jsonl"


def test_flags_become_settings(data, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(distill, "distill", lambda settings, lines, stamp, progress: seen.append((settings, lines)) or FIGURES)
    needed = ("--target", "demo", "--draft", "draft", "--data", data, "--out", tmp_path / "out")
    assert run(*needed) == 0
    shown = capsys.readouterr().out
    assert "temperature 0.7, after" in shown and "61.0%" in shown and "1,234" in shown and f"--draft-model {tmp_path / 'out'}" in shown
    learning = ("--held-out-data", data, "--answers", tmp_path / "answers.json", "--seconds", 5)
    more = (*learning, "--steps", 9, "--batch", 4, "--temperatures", "0.5", "--mesh", "data=2", "--learn", "all", "--seed", 3, "--json")
    assert run(*needed, *more) == 0
    assert json.loads(capsys.readouterr().out) == FIGURES
    (plain, given), (chosen, measured) = seen
    assert plain.state == tmp_path / "out.state" and plain.wanted.temperatures == (0.0, 0.7) and len(given.lines.lines) == 2
    assert given.held_out is None and measured.held_out.flag == "--held-out-data" and plain.answers is None
    assert (chosen.answers, chosen.recipe.seconds, plain.recipe.seconds) == (tmp_path / "answers.json", 5.0, None)
    assert (chosen.recipe.steps, chosen.recipe.rows, chosen.recipe.seed, chosen.wanted.seed) == (9, 4, 3, 3)
    assert (chosen.wanted.temperatures, chosen.wanted.learn, chosen.mesh) == ((0.5,), "all", MeshShape(data=2))


@pytest.mark.parametrize(
    ("flags", "said"),
    [(("--temperatures", "warm"), "--temperatures 'warm'"), (("--batch", 3, "--mesh", "data=2"), "do not divide over 2 replicas"),
     (("--steps", 0), "--steps 0"), (("--mesh", "rows=2"), "data=2,tensor=4"), (("--max-model-len", "long"), "not a count")],
)  # fmt: skip
def test_what_makes_no_sense(data, tmp_path, capsys, flags, said):
    try:
        code = run("--target", "demo", "--draft", "draft", "--data", data, "--out", tmp_path / "out", *flags)
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and said in capsys.readouterr().err and not (tmp_path / "out.state").exists()


def test_a_damaged_line_is_named(data, tmp_path, capsys):
    data.write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    assert run("--target", "demo", "--draft", "draft", "--data", data, "--out", tmp_path / "out") == 2
    assert "line 2: prompt must be text" in capsys.readouterr().err


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    assert "who learns" in capsys.readouterr().out and command.HELP
