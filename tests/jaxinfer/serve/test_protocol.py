"""Heads without end are cut."""

import contextlib
import socket

import pytest

from jaxinfer.serve import protocol


@pytest.mark.parametrize("line", [b"x-long: " + b"a" * 4096, b"GET /" + b"a" * 4096])
def test_a_head_without_end_is_cut(live, client, line):
    end = b""
    with socket.create_connection(("127.0.0.1", live.server.port), timeout=5) as raw, contextlib.suppress(ConnectionError):
        raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + line if line.startswith(b"x") else line)
        for _ in range(10 * protocol.MAX_HEAD_BYTES // 4096):
            raw.sendall(b"a" * 4096)
        end = raw.recv(100)
    assert end == b"", "closed, not answered, and not waited for"
    assert client.get("/health").status_code == 200


def test_connections_that_are_used_long_are_not(client):
    for _ in range(40):
        assert client.get("/health", headers={"x-filler": "a" * 4000}).status_code == 200


def test_without_httptools_uvicorn_chooses(monkeypatch):
    monkeypatch.setattr(protocol, "find_spec", lambda name: None)
    assert protocol.protocol() == "auto"
