"""One call's outputs on their way from the engine's thread to the task that answers the client.

The event loop's thread alone touches a `Stream`: `EngineLoop` feeds it once per engine step, one task reads it. Reading gives batches,
so a client that reads slowly gets several tokens in one event instead of slowing anybody down. This file does not know the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from jaxinfer.request import Output, Request


class Stream:
    """The merged outputs of one call's sequences, as an asynchronous iterator of batches. Close it when you are done.

    accepted: a future that is done once the engine took every sequence, or holds the reason why it did not.
    """

    def __init__(self, requests: Sequence[Request], on_close: Callable[[Stream], None]) -> None:
        self.requests = tuple(requests)
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.fed = time.monotonic()
        self._open = {request.key for request in requests}
        self._on_close = on_close
        self._pending: list[Output] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    @property
    def ids(self) -> tuple[str, ...]:
        """The request ids of the call's sequences, each once."""
        return tuple(dict.fromkeys(request.id for request in self.requests))

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return not self._open

    def feed(self, outputs: Sequence[Output], now: float) -> None:
        """Take what a step produced for this call."""
        self.fed = now
        self._pending.extend(outputs)
        for output in outputs:
            if output.finish_reason is not None:
                self._open.discard((output.request_id, output.index))
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the call: its reader gets the error after the outputs that came before it."""
        self._error = error
        self._open.clear()
        if not self.accepted.done():
            self.accepted.set_exception(error)
            self.accepted.exception()  # seen: a caller that went away meanwhile is no "exception never retrieved"
        self._wake()

    def close(self) -> None:
        """Stop reading: sequences that still run are aborted and their pages freed."""
        if not self._closed:
            self._closed = True
            self._on_close(self)
            self._open.clear()
            self._wake()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[Output]:
        while not self._pending:
            if self._error is not None and not self._closed:
                raise self._error
            if self._closed or not self._open:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        batch, self._pending = self._pending, []
        return batch

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
