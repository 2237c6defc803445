"""What the server says on stderr when it is ready."""

import json
import shlex
import types
from dataclasses import replace

import pytest

from jaxinfer.config import ServerConfig
from jaxinfer.serve import banner
from jaxinfer.serve.context import Context
from jaxinfer.serve.loop import EngineLoop
from jaxinfer.serve.metrics import Metrics
from jaxinfer.serve.phase import Phase
from tests.fakes import FakeEngine, FakeInfo, until


def context(**settings):
    engine = FakeEngine(replace(FakeInfo(), **settings.pop("info", {})))
    loop = EngineLoop(lambda progress: engine)
    loop.start()
    until(lambda: loop.phase is Phase.READY)
    loop.stop()
    loop.phase = Phase.READY
    return Context(ServerConfig(**settings), loop, Metrics(lambda: engine))


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", "http://127.0.0.1:9"), ("0.0.0.0", "http://127.0.0.1:9"), ("::1", "http://[::1]:9")]
)
def test_urls(host, url):
    assert banner.url(ServerConfig(host=host), 9) == url


def test_the_lines(client, live):
    text = "\n".join(banner.lines(context(info={"model": "demo", "device_count": 4, "mesh": "tensor=4"}), 8000, 1.25))
    facts = (
        "ready after 1.2 s", "http://127.0.0.1:8000", "demo: echo", "cpu x 4 (tensor=4), float32",
        "4,096 tokens in float32; up to 16 requests",
        "temperature 0.5", "top_p 1", "small demo model", "curl ",
    )  # fmt: skip
    for words in facts:
        assert words in text
    line = banner.curl(context(), live.url)
    _, url, _, header, _, body = shlex.split(line)
    name, value = header.split(": ")
    assert client.post(url, content=json.dumps(json.loads(body)), headers={name: value}).status_code == 200


def test_the_key_is_never_printed():
    text = "\n".join(banner.lines(context(api_key="sk-secret", host="0.0.0.0"), 1, 0.0))
    assert "sk-secret" not in text
    assert "Bearer KEY" in text
    assert "bearer token" in text
    assert "every machine" in "\n".join(banner.lines(context(host="0.0.0.0"), 1, 0.0))


def test_a_model_without_chat_gets_a_text_to_continue():
    server = context()
    server.engine.loaded.tokenizer.chat_template = None
    assert "/v1/completions" in banner.curl(server, "http://x")


def test_stdout_stays_empty(capsys):
    banner.starting("demo", ServerConfig(), 8000)
    banner.say(types.__name__)
    out, err = capsys.readouterr()
    assert out == ""
    assert "loading 'demo'" in err
