"""`jaxinfer serve`: flags become settings, and only then is the server imported."""

import argparse

import pytest

from jaxinfer.commands import serve
from jaxinfer.config import ConfigError


def parse(*flags):
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(flags)


def test_flags_become_settings(monkeypatch):
    seen = []
    monkeypatch.setattr("jaxinfer.serve.server.serve", lambda engine, server: seen.append((engine, server)) or 0)
    flags = "--model m --port 0 --host 0.0.0.0 --api-key k --served-model-name n --mesh tensor=2 --max-model-len 4k --dtype float32"
    assert serve.run(parse(*flags.split())) == 0
    engine, server = seen[0]
    assert (server.port, server.host, server.api_key, server.served_model_name) == (0, "0.0.0.0", "k", "n")
    assert (engine.model.model, engine.model.max_model_len, engine.model.dtype, engine.execution.mesh.tensor) == ("m", 4096, "float32", 2)


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError):
        serve.run(parse("--port", "99999"))
    with pytest.raises(SystemExit):
        parse("--port", "http")


def test_it_has_a_help_line():
    assert serve.HELP
