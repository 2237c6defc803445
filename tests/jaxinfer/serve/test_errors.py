"""Every error has one shape, and nothing of the inside leaks."""

import json

import pytest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from jaxinfer.request import RequestError
from jaxinfer.serve import errors
from jaxinfer.serve.errors import ApiError
from jaxinfer.tokenizer import TokenizerError


@pytest.mark.parametrize(
    ("raised", "status", "param"),
    [
        (ApiError(404, "no", param="model"), 404, "model"),
        (RequestError("top_p must be above 0", "top_p"), 400, "top_p"),
        (TokenizerError("the chat template refuses these messages"), 400, "messages"),
        (HTTPException(405, headers={"allow": "GET"}), 405, None),
        (HTTPException(418), 418, None),
        (KeyError("/root/secret"), 500, None),
        (RequestValidationError([]), 400, None),
    ],
)
def test_everything_becomes_the_one_shape(raised, status, param):
    answer = errors.of(raised)
    assert answer.status == status
    body = json.loads(answer.json())
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param
    assert "secret" not in answer.json().decode()


def test_overload_tells_when_to_come_back():
    assert ApiError(503, "loading").headers["retry-after"] == "1"
    assert ApiError(429, "busy", headers={"retry-after": "7"}).headers["retry-after"] == "7"
    assert "retry-after" not in ApiError(400, "wrong").headers


@pytest.mark.parametrize(
    ("loc", "path"),
    [
        (("body", "messages", 3, "content"), "messages[3].content"),
        (("body", "stop", "list[str]", 0), "stop[0]"),
        (("body", "a text", "prompt"), "prompt"),
        (("body", "stop", "str"), "stop"),
    ],
)
def test_a_field_is_named_as_users_write_it(loc, path):
    answer = errors.of(RequestValidationError([{"loc": loc, "msg": "Input should be a string", "type": "string_type"}]))
    assert answer.body.param == path
    assert answer.body.message == f"{path}: Input should be a string"


def test_headers_of_an_http_error_are_kept():
    assert errors.of(HTTPException(405, headers={"allow": "GET"})).response().headers["allow"] == "GET"
