"""GET /v1/models and /v1/models/{id}: what is served. A name is compared, never opened."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.serve import context, wire
from jaxinfer.serve.context import Context

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model of this server."""
    return wire.json_response({"object": "list", "data": [_card(context.of(request))]})


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Response:
    """The model, if that is its name."""
    server = context.of(request)
    server.check_model(name)
    return wire.json_response(_card(server))


def _card(server: Context) -> dict[str, Any]:
    info = server.engine.engine.info
    return {
        "id": server.model, "object": "model", "created": server.created, "owned_by": "jaxinfer", "root": server.model, "parent": None,
        "max_model_len": info.max_model_len,
    }  # fmt: skip
