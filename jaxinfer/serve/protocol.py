"""The HTTP parser with a bound on unfinished heads: a client that sends headers without end is cut before they fill the memory.

Heads that do end are judged by `guards.Wall`, with an answer. This file does not know the application.
"""

from __future__ import annotations

import asyncio
from importlib.util import find_spec

MAX_HEAD_BYTES = 64 << 10


def protocol() -> type[asyncio.Protocol] | str:
    """What uvicorn shall parse HTTP with: httptools with the bound, or its own choice (h11 has such a bound itself)."""
    if find_spec("httptools") is None:
        return "auto"
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class BoundedHeads(HttpToolsProtocol):
        """Counts the bytes of a request's head as they come."""

        _head_bytes = 0
        _in_head = False

        def data_received(self, data: bytes) -> None:
            """Parse, then cut the connection if a head has grown too long."""
            super().data_received(data)
            if self._in_head:
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    self.transport.close()

        def on_message_begin(self) -> None:
            """A head begins."""
            super().on_message_begin()
            self._in_head, self._head_bytes = True, 0

        def on_headers_complete(self) -> None:
            """The head has ended."""
            self._in_head = False
            super().on_headers_complete()

    return BoundedHeads
