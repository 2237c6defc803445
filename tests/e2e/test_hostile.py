"""No body makes a 5xx: every field of every route with hostile values, against the whole server on an engine that echoes."""

import json

import pytest

from jaxinfer.serve.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, TokenizeChatBody
from tests.fakes import LiveServer, until

HOSTILE = [
    None, True, False, 0, -1, 1, 2**31, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, "", "a", "\x00", "\U0001f98a" + "é" * 9, "a" * 5000,
    [], [[]], [None], ["a", 1], [1, 2, 3], [-1], [2**40], [[1], ["a"]], {}, {"a": None}, {"1": 1e308}, {"-1": 0}, {"type": "text"},
    [{"role": "user"}], {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}, {"json": {"type": 1}},
    {"regex": "(" * 60}, {"choice": ["\ud800"]}, {"grammar": "start: start"}, {"$ref": "#"}, "(a?){1000}a{1000}",
]  # fmt: skip
ROUTES = {
    "/v1/completions": (CompletionBody, {"prompt": "probe"}),
    "/v1/chat/completions": (ChatBody, {"messages": [{"role": "user", "content": "probe"}]}),
    "/tokenize": (TokenizeBody, {"prompt": "probe"}),
    "/tokenize?chat": (TokenizeChatBody, {"messages": [{"role": "user", "content": "probe"}]}),
    "/detokenize": (DetokenizeBody, {"tokens": [1, 2]}),
}


@pytest.fixture(scope="module")
def live():
    with LiveServer() as server:
        yield server


@pytest.mark.parametrize("path", ROUTES)
def test_every_field_with_every_value(live, path):
    kind, start = ROUTES[path]
    with live.client() as client:
        probe = client.post("/v1/completions", json={"prompt": "probe", "seed": 1}).json()["choices"]
        for name in kind.model_fields:
            for value in HOSTILE:
                body = json.dumps({**start, name: value})
                answer = client.post(path, content=body, headers={"content-type": "application/json"})
                assert answer.status_code in (200, 400, 404), (name, value, answer.status_code)
                if answer.status_code != 200:
                    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
                    assert len(answer.content) < 1000, "an error does not send the request back"
        assert client.post("/v1/completions", json={"prompt": "probe", "seed": 1}).json()["choices"] == probe
    until(lambda: live.fake.running == 0 and live.loop.open_calls == 0)
