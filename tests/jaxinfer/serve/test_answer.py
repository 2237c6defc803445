"""Clients that leave, streams that fail, pings in the quiet: over a real connection."""

import http.client
import json
import socket
import threading

import pytest

from jaxinfer.serve import answer
from tests.fakes import FakeEngine, LiveServer, events, until

LONG = {"prompt": "on and on", "max_tokens": 200, "ignore_eos": True}


@pytest.fixture
def slow():
    """A server of its own with a slow engine, and that engine."""
    engine = FakeEngine(step_seconds=0.005)
    with LiveServer(lambda progress: engine) as server:
        yield server, engine


def post(server, path, body):
    """Send a request on a raw connection; returns the socket."""
    data = json.dumps(body).encode()
    raw = socket.create_connection(("127.0.0.1", server.server.port), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    raw.sendall(head.encode() + data)
    return raw


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_frees_everything(slow, path, stream):
    server, engine = slow
    body = {**LONG, "n": 3, "stream": stream}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    raw = post(server, path, body)
    if stream:
        assert raw.recv(100)
    until(lambda: engine.running == 3)
    raw.close()
    until(lambda: not engine.has_work and server.loop.open_calls == 0, 1.0)
    assert engine.aborted
    assert not server.context.metrics._arrived


def test_survivors_get_their_whole_answer(slow):
    server, engine = slow
    texts = []

    def keep():
        with server.client() as client:
            texts.append(client.post("/v1/completions", json={"prompt": "to the very end", "max_tokens": 100}).json()["choices"][0]["text"])

    keepers = [threading.Thread(target=keep) for _ in range(4)]
    for thread in keepers:
        thread.start()
    raws = [post(server, "/v1/completions", {**LONG, "stream": i % 2 == 0}) for i in range(8)]
    until(lambda: engine.running > 4)
    for raw in raws:
        raw.close()
    for thread in keepers:
        thread.join(10)
    assert texts == ["to the very end"] * 4
    until(lambda: not engine.has_work)


def test_an_error_in_a_row_ends_that_stream_with_an_event(client):
    text = client.post("/v1/completions", json={"prompt": "ERROR here", "stream": True}).text
    *_, last, done = events(text)
    assert done == "[DONE]"
    assert set(json.loads(last)["error"]) == {"message", "type", "param", "code"}
    assert json.loads(last)["error"]["message"] == "planted error in this row"


def test_an_error_in_a_row_is_a_500_when_plain(client, fault):
    error = fault(client.post("/v1/completions", json={"prompt": ["fine", "ERROR here"]}), 500)
    assert error["message"] == "planted error in this row"


def test_an_engine_that_crashes_ends_streams_with_an_event_and_health():
    engine = FakeEngine(step_seconds=0.005)
    with LiveServer(lambda progress: engine) as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            engine.crash = True
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "failed"
        assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 503


def test_comments_keep_a_quiet_connection_open(monkeypatch, slow):
    monkeypatch.setattr(answer, "PING_SECONDS", 0.05)
    server, engine = slow
    engine.hang = True
    with server.client() as client, client.stream("POST", "/v1/completions", json={"prompt": "hi", "stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines) == ": ping"
        engine.hang = False
        engine.release.set()
        assert next(line for line in lines if line.startswith("data: "))


def test_one_connection_serves_many_requests(live):
    connection = http.client.HTTPConnection("127.0.0.1", live.server.port, timeout=10)
    for stream in (True, False, True):
        body = json.dumps({"prompt": "again", "stream": stream})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        assert b"again" in connection.getresponse().read() or stream
    connection.close()


def test_too_many_are_told_to_come_back(fault):
    engine = FakeEngine(queue_limit=1, step_seconds=0.01)
    with LiveServer(lambda progress: engine) as server, server.client() as client:
        raw = post(server, "/v1/completions", LONG)
        until(lambda: engine.running == 1)
        refused = client.post("/v1/completions", json={"prompt": "a"})
        assert fault(refused, 429)["code"] == "overloaded"
        assert refused.headers["retry-after"]
        raw.close()
