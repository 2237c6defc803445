"""The one shape of every error a client sees: `{"error": {"message", "type", "param", "code"}}`, all four keys, always.

Whatever is raised on the way of a request becomes an `ApiError` in `of`, and nothing else writes errors. A message says what, why
and what to do; text of unexpected exceptions (paths, addresses, reprs) stays in the log. This file does not know which routes exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jaxinfer.request import RequestError
from jaxinfer.tokenizer import TokenizerError

RETRY_SECONDS = 1
INTERNAL = "the server failed on this request; its log has the details under the x-request-id of this answer"
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorBody(msgspec.Struct):
    """The inside of an error answer, in OpenAI's words."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ApiError(Exception):
    """An answer other than 2xx. `param` names the request's field; 429 and 503 tell clients to come back."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
        self.body = ErrorBody(message, kind, param, code)
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("retry-after", str(RETRY_SECONDS))

    def json(self) -> bytes:
        """The answer's body."""
        return msgspec.json.encode({"error": self.body})

    def response(self) -> Response:
        """The whole answer."""
        return Response(self.json(), self.status, self.headers, "application/json")


def refused(param: str, message: str, code: str | None = None) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, message, param=param, code=code)


def of(error: Exception) -> ApiError:
    """The answer for anything that was raised; what was not meant for clients becomes a plain 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param)
    if isinstance(error, TokenizerError):
        return ApiError(400, str(error), param="messages")
    if isinstance(error, RequestValidationError):
        return _of_validation(error.errors())
    if isinstance(error, HTTPException):
        return _of_status(error)
    return ApiError(500, INTERNAL, code="internal_error")


def _of_status(error: HTTPException) -> ApiError:
    messages = {
        404: "no such route; GET /openapi.json lists the routes",
        405: "this route does not answer that method; the Allow header names those it does",
        400: "the body could not be read; send JSON with Content-Type: application/json",
    }
    message = messages.get(error.status_code, HTTPStatus(error.status_code).phrase)
    return ApiError(error.status_code, message, code="not_found" if error.status_code == 404 else None, headers=error.headers)


def _of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Name the first field that is wrong: the others are often only consequences (the arms of a union)."""
    if not errors:
        return ApiError(400, "the request is not valid")
    first = errors[0]
    path = field_path([part for part in first["loc"] if part not in ("body", "query", "path")])
    reason = first["msg"].removeprefix("Value error, ")
    if not path:
        return ApiError(400, "the body must be a JSON object; send Content-Type: application/json")
    if first["type"] == "missing":
        reason = "this field is required"
    return ApiError(400, f"{path}: {reason}", param=path)


def field_path(parts: Sequence[str | int]) -> str:
    """Where a value stands, as users write it: `messages[0].content`. Names of union arms (not fields) are left out."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool", "list", "dict"):
            path += f".{part}" if path else part
    return path[:200]
