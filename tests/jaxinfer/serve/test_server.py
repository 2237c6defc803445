"""Start and end of the process: ports, signals, exit codes. Each server here is a process of its own."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import httpx2
import pytest

from jaxinfer.config import ConfigError, EngineConfig, ExecutionConfig, ServerConfig
from jaxinfer.engine import engine
from jaxinfer.serve import server
from jaxinfer.serve.server import bind, serve
from tests.fakes import FakeEngine, until

ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from jaxinfer.config import ConfigError, ServerConfig
from jaxinfer.serve.server import bind, run
from tests.fakes import FakeEngine

def factory(progress):
    progress("compile", 1, 2)
    {load}
    return FakeEngine(step_seconds=0.01)

if __name__ == "__main__":
    config = ServerConfig(port=0, drain_seconds={drain})
    listening = bind(config.host, 0)
    print(listening.getsockname()[1], flush=True)
    sys.exit(run(factory, config, listening, model="fake"))
"""


class Process:
    """A server in a process of its own; `port` is where it listens."""

    def __init__(self, load="pass", drain=30.0):
        code = SCRIPT.format(root=str(ROOT), load=load, drain=drain)
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def ready(self):
        until(lambda: self.health() == 200)
        return self

    def health(self):
        try:
            return httpx2.get(self.url + "/health", timeout=5).status_code
        except httpx2.TransportError:
            return None

    def end(self, *signals):
        for sent in signals:
            self.process.send_signal(sent)
            time.sleep(0.15)
        return self.wait()

    def wait(self):
        out, self.err = self.process.communicate(timeout=20)
        assert out == "", "stdout carries results alone"
        assert "Traceback" not in self.err or "planted" in self.err
        return self.process.returncode


def stream(url, seconds, lines):
    body = {"prompt": "x" * 10, "max_tokens": int(seconds / 0.01), "ignore_eos": True, "stream": True}
    try:
        with httpx2.stream("POST", url + "/v1/completions", json=body, timeout=20) as response:
            lines += [line for line in response.iter_lines() if line]
    except httpx2.TransportError:
        lines.append("cut")


def test_sigterm_drains_and_refuses_the_new():
    server = Process().ready()
    lines = []
    reader = threading.Thread(target=stream, args=(server.url, 1.0, lines))
    reader.start()
    until(lambda: httpx2.get(server.url + "/load").json()["server_load"] == 1)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.health() == 503)
    refused = httpx2.post(server.url + "/v1/completions", json={"prompt": "a"})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    reader.join(20)
    assert server.wait() == 0
    assert "ready after" in server.err
    assert server.url in server.err
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("signals", "drain", "code"), [((signal.SIGTERM,), 0.1, 0), ((signal.SIGTERM,) * 2, 30.0, 0), ((signal.SIGINT,), 30.0, 130)]
)
def test_ways_to_end_now(signals, drain, code):
    server = Process(drain=drain).ready()
    lines = []
    reader = threading.Thread(target=stream, args=(server.url, 2.0, lines))
    reader.start()
    until(lambda: httpx2.get(server.url + "/load").json()["server_load"] == 1)
    begun = time.monotonic()
    assert server.end(*signals) == code
    assert time.monotonic() - begun < 8
    reader.join(20)
    assert "error" in json.loads(lines[-2].removeprefix("data: ")), "the cut stream was told so"


def test_while_it_loads_health_answers_and_a_signal_ends_it():
    server = Process(load="time.sleep(60)")
    until(lambda: server.health() == 503)
    body = httpx2.get(server.url + "/health").json()
    assert (body["stage"], body["done"], body["total"]) == ("compile", 1, 2)
    assert server.end(signal.SIGINT) == 130


def test_a_model_that_cannot_be_loaded_ends_the_process():
    server = Process(load="raise ConfigError('planted: no such model')")
    assert server.wait() == 1
    assert "planted: no such model" in server.err


def test_drafts_that_are_not_made_are_not_checked():
    with pytest.raises(ConfigError, match="--speculate off"):
        serve(EngineConfig(), ServerConfig(port=0, shadow_check=0.01))


@pytest.mark.parametrize("drafts", [None, object()])
def test_a_bundle_may_bring_the_drafts(drafts, monkeypatch):
    """That is known once it is loaded."""
    made = FakeEngine(speculator=drafts)
    monkeypatch.setattr(engine, "Engine", lambda config, progress: made)
    monkeypatch.setattr(server, "bind", lambda host, port: None)
    monkeypatch.setattr(server, "run", lambda factory, *rest, **named: int(factory(lambda stage, done, total: None) is made))
    config = EngineConfig(execution=ExecutionConfig(bundle="somewhere"))
    with nullcontext() if drafts else pytest.raises(ConfigError, match="planned without drafts"):
        assert serve(config, ServerConfig(port=0, shadow_check=0.01)) == 1


def test_ports_and_hosts():
    with bind("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="in use"):
        bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="no address of this machine"):
        bind("no.such.host.invalid", 8000)
    with pytest.raises(ConfigError, match="cannot listen"):
        bind("192.0.2.1", 8000)
    if socket.has_ipv6 and Path("/proc/net/if_inet6").exists() and Path("/proc/net/if_inet6").read_text():
        bind("::1", 0).close()
