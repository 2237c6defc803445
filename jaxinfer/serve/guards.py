"""What every request passes before a route sees it, as raw ASGI, each guard in this one place.

Outermost first: `Wall` (request id, access log, count of open requests, the last net under exceptions), `KeyGuard` (the API key,
default deny), `BodyGuard` (sizes, and strict JSON for every body). A route added later is behind all three without asking.
This file does not know what any route does.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from jaxinfer.serve import errors
from jaxinfer.serve.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 8 << 20
MAX_HEADER_BYTES = 16 << 10
THREAD_BODY_BYTES = 256 << 10  # larger bodies are checked in a thread, so that the event loop goes on
OPEN_PATHS = frozenset({"/health", "/v1/health", "/ping", "/"})  # "/" is the chat page: static, it asks for the key itself
QUIET_PATHS = frozenset({"/health", "/v1/health", "/ping", "/metrics", "/load"})  # asked every few seconds; logged for debugging only
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")
_JSON_TYPE = re.compile(rb"application/([\w.-]+\+)?json\s*(;.*)?", re.IGNORECASE)

logger = logging.getLogger(__name__)


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of that (lower-case) name, b"" where there is none."""
    return next((value for key, value in scope["headers"] if key == name), b"")


class Wall:
    """Outermost: every answer carries x-request-id, every exception becomes an error answer, every request one log line."""

    def __init__(self, app: App, counter: Counter) -> None:
        self.app = app
        self.counter = counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer; see the class."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = header(scope, b"x-request-id").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status = 0

        async def sender(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        start = time.perf_counter()
        self.counter.open += 1
        try:
            _check_header_size(scope)
            await self.app(scope, receive, sender)
        except Exception as error:
            answer = errors.of(error)
            if answer.status >= 500:
                logger.exception("request %s failed", request_id)
            if status == 0:
                await answer.response()(scope, receive, sender)
        finally:
            self.counter.open -= 1
            path, took = ascii(scope["path"][:200])[1:-1], 1e3 * (time.perf_counter() - start)
            level = logging.DEBUG if path in QUIET_PATHS else logging.INFO
            logger.log(level, "%s %s %d %.1f ms %s", scope["method"], path, status, took, request_id)


class Counter:
    """How many HTTP requests are open."""

    open: int = 0


def _check_header_size(scope: Scope) -> None:
    size = sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope.get("raw_path") or b"") + len(scope["query_string"])
    if size > MAX_HEADER_BYTES:
        message = f"the request's headers have {size} bytes; at most {MAX_HEADER_BYTES} are accepted"
        raise ApiError(431, message, headers={"connection": "close"})


class KeyGuard:
    """Compares the bearer token with the key in constant time; every path but the open ones is denied without it."""

    def __init__(self, app: App, key: str | None) -> None:
        self.app = app
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass what is allowed; see the class."""
        if self.key is not None and scope["type"] != "lifespan" and scope["path"] not in OPEN_PATHS and not self._allowed(scope):
            raise ApiError(
                401,
                "this server needs its API key: send the header `Authorization: Bearer KEY` with the key it was started with",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        await self.app(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        scheme, _, token = header(scope, b"authorization").partition(b" ")
        matches = hmac.compare_digest(token.strip(), self.key or b"")
        return matches and scheme.lower() == b"bearer"


class BodyGuard:
    """Reads the whole body within its size, checks that it is strict JSON, and hands it on in one piece."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the checked body on; see the class."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        body = await _read(scope, receive)
        if body is None:
            return  # the client left before it had sent everything
        if body:
            await _check_json(scope, body)
        waiting = True

        async def replay() -> Message:
            nonlocal waiting
            if waiting:
                waiting = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self.app(scope, replay, send)


async def _read(scope: Scope, receive: Receive) -> bytes | None:
    length = header(scope, b"content-length")
    if length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
        raise _too_large()
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        more = message.get("more_body", False)
        if size > MAX_BODY_BYTES:
            raise _too_large()
    return b"".join(parts)


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes; send less in one request", headers={"connection": "close"})


async def _check_json(scope: Scope, body: bytes) -> None:
    if not _JSON_TYPE.fullmatch(header(scope, b"content-type").strip()):
        raise ApiError(400, "the body must be JSON; send the header Content-Type: application/json")
    if len(body) > THREAD_BODY_BYTES:
        await asyncio.to_thread(strict_json, body)
    else:
        strict_json(body)


def strict_json(body: bytes) -> Any:
    """Parse JSON as its standard has it: UTF-8, no NaN or Infinity, no number beyond a double, no key twice, no half characters.

    Raises:
        ApiError: 400, saying what is wrong.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not valid UTF-8") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the body has an escape such as \\ud800 that is half of a character; send whole characters") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError:
        raise ApiError(400, "the body has an integer with too many digits") from None
    return value


def _no_constant(name: str) -> float:
    raise ApiError(400, f"the body holds {name}, which is not JSON; send a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ApiError(400, "the body holds a number that is too large; send a finite number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ApiError(400, "an object in the body has the same key twice; which one is meant cannot be known")
    return values
