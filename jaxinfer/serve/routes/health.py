"""Whether the server is well and what it is: /health, /v1/health, /ping, /version, /load, /server_info.

/health is 200 only while the engine is ready and makes progress: a hung engine, a loading one and a draining one are 503 with a reason.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

import jaxinfer
from jaxinfer.serve import context, wire
from jaxinfer.serve.convert import effective_defaults
from jaxinfer.serve.errors import RETRY_SECONDS, ErrorBody
from jaxinfer.serve.loop import EngineLoop
from jaxinfer.serve.phase import Phase

router = APIRouter()


@router.get("/health")
@router.get("/v1/health")
@router.get("/ping")
@router.post("/ping")
async def health(request: Request) -> Response:
    """200 when requests can be answered; otherwise 503 with the stage of loading or the reason."""
    engine = context.of(request).engine
    status = _status(engine)
    if status == "ok":
        return wire.json_response({"status": status})
    body: dict[str, Any] = {"status": status, "stage": engine.stage.name, "done": engine.stage.done, "total": engine.stage.total}
    message = "the engine makes no progress; restart the server" if status == "stalled" else str(engine.unavailable())
    body["error"] = ErrorBody(message, "server_error", None, status)
    return wire.json_response(body, 503, {"retry-after": str(RETRY_SECONDS)})


def _status(engine: EngineLoop) -> str:
    if engine.stalled:
        return "stalled"
    return "ok" if engine.phase is Phase.READY else engine.phase.value


@router.get("/version")
async def version() -> Response:
    """The version of the server."""
    return wire.json_response({"version": jaxinfer.__version__})


@router.get("/load")
async def load(request: Request) -> Response:
    """How many calls are being answered."""
    server = context.of(request)
    return wire.json_response({"server_load": server.engine.open_calls, "open_requests": server.counter.open})


@router.get("/server_info")
async def server_info(request: Request) -> Response:
    """What is running and the sampling defaults in effect (request > the model's generation_config.json > OpenAI's)."""
    server = context.of(request)
    engine = server.engine.engine
    return wire.json_response({
        "version": jaxinfer.__version__, **asdict(engine.info), "model": server.model,
        "sampling_defaults": effective_defaults(engine.defaults),
    })  # fmt: skip
