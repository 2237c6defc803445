"""Health before, while and after the engine works; version, load and what is running."""

import threading

import openai
import pytest

import jaxinfer
from tests.fakes import FakeEngine, LiveServer, until


def test_well(client):
    for path in ("/health", "/v1/health", "/ping"):
        assert client.get(path).json() == {"status": "ok"}


def test_the_stage_is_told_until_ready(fault):
    gate = threading.Event()

    def factory(progress):
        progress("compile", 3, 12)
        assert gate.wait(10)
        return FakeEngine()

    with LiveServer(factory) as server, server.client() as client:
        until(lambda: server.loop.stage.total)
        answer = client.get("/health")
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        body = answer.json()
        assert (body["status"], body["stage"], body["done"], body["total"]) == ("loading", "compile", 3, 12)
        assert "compiling 3 of 12" in body["error"]["message"]
        for path in ("/v1/models", "/server_info", "/tokenizer_info"):
            waiting = client.get(path)
            assert fault(waiting, 503)["code"] == "loading"
            assert waiting.headers["retry-after"] == "1"
        assert client.get("/version").status_code == client.get("/metrics").status_code == client.get("/").status_code == 200
        fault(client.post("/v1/completions", json={"prompt": "a"}), 503)
        threading.Timer(0.1, gate.set).start()
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=4) as patient:
            assert patient.models.list().data[0].id == "fake", "the official client waits by itself"
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("way", ["drain", "hang", "crash"])
def test_unwell(way, fault):
    engine = FakeEngine()
    with LiveServer(lambda progress: engine, stall_seconds=0.1) as server, server.client() as client:
        until(lambda: client.get("/health").status_code == 200)
        asking = threading.Thread(target=lambda: ask(server))
        if way == "drain":
            server.loop.drain()
        else:
            setattr(engine, way, True)
        asking.start()
        until(lambda: client.get("/health").status_code == 503)
        answer = client.get("/health")
        expected = {"drain": "draining", "hang": "stalled", "crash": "failed"}[way]
        assert answer.json()["status"] == expected
        assert answer.headers["retry-after"]
        fault(answer, 503)
        engine.release.set()
        asking.join(10)


def ask(server):
    with server.client() as other:
        other.post("/v1/completions", json={"prompt": "a", "stream": True})


def test_version_load_and_info(client):
    assert client.get("/version").json() == {"version": jaxinfer.__version__}
    assert client.get("/load").json()["server_load"] == 0
    info = client.get("/server_info").json()
    assert info["model"] == "fake"
    assert info["sampling_defaults"]["temperature"] == 0.5
    assert info["sampling_defaults"]["top_p"] == 1.0
    assert "folder" not in info
