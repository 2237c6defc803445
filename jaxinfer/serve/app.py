"""The web application: one FastAPI app that mounts every file of `routes/` with a `router`, behind the guards of `guards.py`.

Adding an endpoint is adding a file there. Errors of every kind leave through `errors.of`, in one shape. This file does not know any
route by name.
"""

from __future__ import annotations

import asyncio
import faulthandler
import importlib
import logging
import pkgutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import jaxinfer
from jaxinfer.request import RequestError
from jaxinfer.serve import errors, routes
from jaxinfer.serve.context import Context
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.guards import BodyGuard, KeyGuard, Wall
from jaxinfer.tokenizer import TokenizerError

WATCH_SECONDS = 1.0
DESCRIPTION = "An OpenAI-compatible server. Every known request field works, is refused with a 400 that names it, or changes nothing here."
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

logger = logging.getLogger(__name__)


def create_app(context: Context) -> FastAPI:
    """The application around a context; its engine loop is started by the caller."""
    app = FastAPI(
        title="jaxinfer", version=jaxinfer.__version__, description=DESCRIPTION, docs_url=None, redoc_url=None,
        redirect_slashes=False, lifespan=_lifespan,
    )  # fmt: skip
    app.state.context = context
    for module in pkgutil.iter_modules(routes.__path__):
        router = getattr(importlib.import_module(f"{routes.__name__}.{module.name}"), "router", None)
        if router is not None:
            app.include_router(router)
    for kind in (ApiError, RequestError, TokenizerError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(BodyGuard)
    app.add_middleware(KeyGuard, key=context.config.api_key)
    app.add_middleware(Wall, counter=context.counter)  # added last: outermost
    app.openapi_schema = _honest(app.openapi())
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    return errors.of(error).response()


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    context: Context = app.state.context
    context.engine.attach(asyncio.get_running_loop())
    watch = asyncio.create_task(_watch(context))
    yield
    watch.cancel()
    for threads in (context.tokenising, context.compiling):
        threads.shutdown(wait=False, cancel_futures=True)


async def _watch(context: Context) -> None:
    """Fold in the engine's step records, and when it hangs, write every thread's stack to the log, once for each hang."""
    told = False
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        context.metrics.take_steps()
        stalled = context.engine.stalled
        if stalled and not told:
            logger.error("the engine makes no progress; the stacks of all threads follow")
            faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
        told = stalled


def _honest(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI promises its own 422 for every body; say what really comes."""
    answer = {"description": "What went wrong and what to do", "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = answer
    for unused in ("HTTPValidationError", "ValidationError"):
        schema.get("components", {}).get("schemas", {}).pop(unused, None)
    return schema
