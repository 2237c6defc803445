"""What every request passes: ids, key, sizes, strict JSON; every route of the application is behind them."""

import json
import logging
import socket

import pytest
from starlette.routing import Route

from jaxinfer.serve import guards
from jaxinfer.serve.app import create_app
from jaxinfer.serve.errors import ApiError
from tests.fakes import LiveServer, until

KEY = "sk-very-secret"


@pytest.fixture(scope="module")
def locked():
    with LiveServer(api_key=KEY) as server:
        yield server


def routes(context):
    """Every (method, path) of the application."""
    found = []
    for route in create_app(context).router.routes:
        inner = getattr(getattr(route, "original_router", None), "routes", [route])
        found += [(method, r.path.replace("{name:path}", "m")) for r in inner if isinstance(r, Route) for method in r.methods or ()]
    return found


def test_every_route_but_health_and_the_page_needs_the_key(locked):
    listed = routes(locked.context)
    assert {"/v1/chat/completions", "/v1/completions", "/metrics", "/openapi.json", "/tokenize", "/server_info"} <= {p for _, p in listed}
    with locked.client() as client:
        for method, path in [*listed, ("GET", "/nowhere"), ("POST", "/v1/anything"), ("GET", "/health/"), ("GET", "/Health")]:
            for headers in ({}, {"authorization": "Bearer nope"}, {"authorization": f"Basic {KEY}"}, {"authorization": KEY}):
                answer = client.request(method, path, headers=headers)
                if path in guards.OPEN_PATHS:
                    assert answer.status_code in (200, 503, 405)
                else:
                    assert answer.status_code == 401, (method, path)
                    assert KEY not in answer.text
        assert {"/health", "/v1/health", "/ping", "/"} == guards.OPEN_PATHS


def test_the_key_opens(locked, fault):
    with locked.client() as client:
        assert client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert client.get("/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200
        assert client.get("/").status_code == 200
        error = fault(client.get("/v1/models"), 401)
        assert error["code"] == "invalid_api_key"
        assert client.get("/v1/models").headers["www-authenticate"] == "Bearer"


def test_request_ids_are_echoed_or_made(client):
    assert client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    strange = client.get("/health", headers={"x-request-id": "a b<script>"}).headers["x-request-id"]
    assert len(strange) == 32
    assert client.get("/nowhere").headers["x-request-id"] != client.get("/nowhere").headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b'{"prompt": NaN}', "NaN"),
        (b'{"prompt": "a", "temperature": Infinity}', "Infinity"),
        (b'{"prompt": "a", "temperature": 1e999}', "too large"),
        (b'{"prompt": "a", "prompt": "b"}', "twice"),
        (b'{"prompt": "a\\ud800"}', "half of a character"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b"{" * 100_000, "valid JSON"),
        (b"[" * 200_000, "nested"),
        (b'{"n": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"prompt": ', "line 1, column"),
        (b"\xef\xbb\xbf{}", "valid JSON"),
        (b"", None),
        (b"[]", None),
        (b'"text"', None),
    ],
)
def test_bodies_that_are_not_strict_json(client, fault, body, word):
    error = fault(client.post("/v1/completions", content=body, headers={"content-type": "application/json"}), 400)
    assert word is None or word in error["message"]


def test_strict_json_reads_what_is_right():
    assert guards.strict_json('{"a": [1, 2.5, "é\\u00e9", {"b": null}]}'.encode()) == {"a": [1, 2.5, "éé", {"b": None}]}
    with pytest.raises(ApiError):
        guards.strict_json(b"-Infinity")


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_only_json_is_read(client, fault, kind):
    headers = {"content-type": kind} if kind else {}
    fault(client.post("/tokenize", content=b'{"prompt": "a"}', headers=headers), 400)


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON", "application/problem+json"])
def test_json_types(client, kind):
    assert client.post("/tokenize", content=b'{"prompt": "a"}', headers={"content-type": kind}).status_code == 200


def test_large_bodies_and_headers_are_refused(client, fault):
    big = b'{"prompt": "' + b"a" * guards.MAX_BODY_BYTES + b'"}'
    fault(client.post("/tokenize", content=big, headers={"content-type": "application/json"}), 413)

    def parts():
        for _ in range(9):
            yield b" " * (1 << 20)

    fault(client.post("/tokenize", content=parts(), headers={"content-type": "application/json"}), 413)
    fault(client.get("/health", headers={"x-long": "a" * 20_000}), 431)


def test_a_large_body_within_the_limit_is_read_in_a_thread(client):
    body = json.dumps({"prompt": "a" * (guards.THREAD_BODY_BYTES + 1)}).encode()
    answer = client.post("/tokenize", content=body, headers={"content-type": "application/json"})
    assert answer.json()["count"] == guards.THREAD_BODY_BYTES + 1


def test_a_client_that_leaves_within_its_body_costs_nothing(live):
    with socket.create_connection(("127.0.0.1", live.server.port)) as raw:
        raw.sendall(b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
    with live.client() as client:
        assert client.get("/health").status_code == 200


def test_unforeseen_errors_show_nothing_of_the_inside(client, fault, caplog):
    caplog.set_level(logging.CRITICAL)
    error = fault(client.post("/v1/completions", json={"prompt": "BROKEN"}), 500)
    assert "secret" not in error["message"]
    assert error["code"] == "internal_error"
    assert client.get("/health").status_code == 200


def test_the_log_has_no_prompt_and_no_key(locked, caplog):
    caplog.set_level(logging.DEBUG)
    with locked.client(headers={"authorization": f"Bearer {KEY}"}) as client:
        assert client.post("/v1/completions?q=hidden", json={"prompt": "my diary"}).status_code == 200
        client.get("/a%0Ab")

    def text():
        return "\n".join(record.getMessage() for record in caplog.records if record.name.startswith(("jaxinfer", "uvicorn")))

    until(lambda: "GET /a\\nb 404" in text() and "POST /v1/completions 200" in text())
    for secret in (KEY, "diary", "hidden"):
        assert secret not in text()
