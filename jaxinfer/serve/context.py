"""What the routes share: the running engine, the settings, the metrics, and the steps that every generating route takes.

One `Context` is made by `create_app` and found by a route through `of(request)`. This file does not know any route.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from jaxinfer.config import ServerConfig
from jaxinfer.serve import convert, structured
from jaxinfer.serve.convert import Call, Limits
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.fields import UnknownFields
from jaxinfer.serve.guards import Counter
from jaxinfer.serve.loop import EngineLoop
from jaxinfer.serve.metrics import Metrics
from jaxinfer.serve.schema import Body, ChatBody, CompletionBody

T = TypeVar("T")
TOKENISE_THREADS = 2


@dataclass(frozen=True)
class Context:
    """The server's state. `counter` counts open HTTP requests; `tokenising` runs what would hold up the event loop.

    compiling: runs grammars, which may take seconds, one after the other, so that hostile ones hold up nobody but each other.
    """

    config: ServerConfig
    engine: EngineLoop
    metrics: Metrics
    counter: Counter = field(default_factory=Counter)
    unknown: UnknownFields = field(default_factory=UnknownFields)
    tokenising: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(TOKENISE_THREADS, "tokenise"))
    compiling: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "grammars"))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> str:
        """The name under which the model is served."""
        return self.config.served_model_name or self.engine.engine.info.model

    @property
    def limits(self) -> Limits:
        """What the loaded model allows."""
        return convert.limits_of(self.engine.engine)

    def check(self, body: Body) -> None:
        """Refuse a model that is not this one, and note fields that nobody knows.

        Raises:
            ApiError: 404, or 503 while the model is loading.
        """
        self.check_model(getattr(body, "model", None))
        self.unknown.note((body.model_extra or {}).keys())

    def check_model(self, name: str | None) -> None:
        """Compare a model's name with the one that is served; it is never opened."""
        if name is not None and name != self.model:
            message = f"this server has no model of that name; it serves {self.model!r} (GET /v1/models)"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run something slow (tokenising, rendering) off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.tokenising, work)

    async def call(self, body: CompletionBody | ChatBody) -> Call:
        """Validate a body wholly and make the call that the engine will answer.

        Raises:
            ApiError, RequestError, TokenizerError: the request cannot be honoured.
        """
        engine = self.engine.engine
        self.check(body)
        call = await self.in_thread(lambda: convert.call_of(body, engine, self.model))
        if call.sequences[0].params.grammar is not None:
            await asyncio.get_running_loop().run_in_executor(self.compiling, structured.prepare, body, engine.grammars)
        return call


def of(request: HttpRequest) -> Context:
    """The context of the application that got this request."""
    return request.app.state.context
