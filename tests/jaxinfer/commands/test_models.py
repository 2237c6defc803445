"""`jaxinfer models` lists what can run."""

import json

from jaxinfer import __main__ as program
from jaxinfer.checkpoint import hub
from jaxinfer.config import ConfigError
from jaxinfer.models import find


def test_everything_is_listed(capsys):
    assert program.main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "llama" in found["architectures"] and set(found["shapes"]) == set(find.known_shapes())
    assert found["embedded"][0]["name"] == "demo" and 10e6 < found["embedded"][0]["parameters"] < 20e6


def test_the_list_for_people(capsys):
    assert program.main(["models"]) == 0
    out = capsys.readouterr().out
    assert "  llama" in out and "M parameters" in out and "context 2048" in out


def test_a_missing_demo_is_said(monkeypatch, capsys):
    def missing(name, revision=None):
        raise ConfigError("nowhere")

    monkeypatch.setattr(hub, "resolve", missing)
    assert program.main(["models"]) == 0
    assert capsys.readouterr().err == "jaxinfer: the embedded model is missing: nowhere\n"
