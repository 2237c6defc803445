"""From the engine's outputs to what the client reads, plain or as server-sent events, and what happens when it leaves.

`answer` submits a call and returns the response: `_whole` gathers all outputs, `EventStream` writes them as they come. Both watch the
connection all the while and close the call's stream when the client is gone, so that its sequences stop and their pages are free.
What differs between chat and text is behind `Form`. This file does not know how requests are validated.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol, runtime_checkable

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxinfer.request import FinishReason, Output
from jaxinfer.serve import errors, wire
from jaxinfer.serve.context import Context
from jaxinfer.serve.convert import Call
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.guards import Receive, Scope, Send
from jaxinfer.serve.schema import Sampling
from jaxinfer.serve.stream import Stream

logger = logging.getLogger(__name__)

PING_SECONDS = 15.0
CLIENT_GONE = 499  # nobody reads it; it stands in the log


@runtime_checkable
class Form(Protocol):
    """Chat or text: how outputs of a choice look as chunks, and all of them as a whole."""

    def chunk(self, choice: int, output: Output) -> Any:
        """What an output adds, as a struct; None if it adds nothing that the client could see."""

    def whole(self, outputs: Sequence[Sequence[Output]], usage: wire.Usage) -> Any:
        """The answer, from each choice's outputs in order."""

    def usage_chunk(self, usage: wire.Usage) -> Any:
        """The chunk without choices that ends a stream when the client asked for its usage."""


async def answer(request: HttpRequest, context: Context, call: Call, *, form: Form, body: Sampling) -> Response:
    """Have the engine answer a call, in the way that the body asks for.

    Raises:
        ApiError, RequestError: the engine did not take the call, or failed on it.
    """
    context.metrics.arrived(call, time.monotonic())
    try:
        stream = await context.engine.submit(call.sequences)
    except BaseException:
        context.metrics.left(call)
        raise
    if body.stream:
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return EventStream(context, stream, call, form=form, include_usage=include_usage)
    async with _reading(context, call, stream, request.receive):
        return await _whole(call, stream, form)


@contextlib.asynccontextmanager
async def _reading(context: Context, call: Call, stream: Stream, receive: Receive) -> AsyncIterator[None]:
    """Close the stream when its reader is done or its client is gone, whichever comes first."""
    watcher = asyncio.create_task(_close_when_gone(receive, stream))
    try:
        yield
    finally:
        watcher.cancel()
        stream.close()
        context.metrics.left(call)


async def _close_when_gone(receive: Receive, stream: Stream) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.close()


async def _whole(call: Call, stream: Stream, form: Form) -> Response:
    outputs: list[list[Output]] = [[] for _ in call.sequences]
    async for batch in stream:
        for choice, output in call.outputs(batch):
            raise_if_failed(output)
            outputs[choice].append(output)
    if any(not parts or parts[-1].finish_reason is None for parts in outputs):
        return Response(status_code=CLIENT_GONE)
    return wire.json_response(form.whole(outputs, usage_of(call, [parts[-1].output_tokens for parts in outputs])))


def usage_of(call: Call, output_tokens: Sequence[int]) -> wire.Usage:
    """What a call took: each prompt once, and the tokens of every choice."""
    completion = sum(output_tokens)
    return wire.Usage(call.prompt_tokens, completion, call.prompt_tokens + completion)


def raise_if_failed(output: Output) -> None:
    """Turn an output that ends in an error into an exception.

    Raises:
        ApiError: 500 or, when the server aborted the request, 503.
    """
    if output.finish_reason is FinishReason.ERROR:
        raise ApiError(500, output.error or "the model failed on this request; try again, with other sampling settings if it persists")
    if output.finish_reason is FinishReason.ABORT:
        raise ApiError(503, "the server ended this request before it was complete; try again", code="aborted")


class EventStream(Response):
    """Writes a call's outputs as server-sent events, several in one send when several are ready.

    While nothing comes (a long prefill) a comment keeps the connection open. Errors after the first byte are events too; `[DONE]` is last.
    """

    media_type = "text/event-stream"

    def __init__(self, context: Context, stream: Stream, call: Call, *, form: Form, include_usage: bool) -> None:
        super().__init__(None, 200, wire.EVENT_HEADERS)
        del self.headers["content-length"]
        self._context = context
        self._stream = stream
        self._call = call
        self._form = form
        self._include_usage = include_usage
        self._output_tokens = [0] * len(call.sequences)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; the sequences are aborted if the client leaves before the end."""
        async with _reading(self._context, self._call, self._stream, receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            pinger = asyncio.create_task(self._ping(send))
            try:
                async for batch in self._stream:
                    await _write(send, self._events(batch))
                await _write(send, self._end())
            except Exception as error:
                await _write(send, self._failed(error))
            finally:
                pinger.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _events(self, batch: Sequence[Output]) -> bytes:
        events = []
        for choice, output in self._call.outputs(batch):
            raise_if_failed(output)
            self._output_tokens[choice] = max(output.output_tokens, self._output_tokens[choice])
            chunk = self._form.chunk(choice, output)
            if chunk is not None:
                if self._include_usage:
                    chunk.usage = None
                events.append(wire.event(chunk))
        return b"".join(events)

    def _end(self) -> bytes:
        usage = wire.event(self._form.usage_chunk(usage_of(self._call, self._output_tokens))) if self._include_usage else b""
        return usage + wire.DONE

    def _failed(self, error: Exception) -> bytes:
        if not isinstance(error, ApiError):
            logger.exception("a stream failed")
        return wire.event(errors.of(error).json()) + wire.DONE

    async def _ping(self, send: Send) -> None:
        while True:
            quiet = time.monotonic() - self._stream.fed
            if quiet >= PING_SECONDS:
                await _write(send, wire.PING)
                quiet = 0.0
            await asyncio.sleep(PING_SECONDS - quiet)


async def _write(send: Send, data: bytes) -> None:
    if data:
        await send({"type": "http.response.body", "body": data, "more_body": True})
