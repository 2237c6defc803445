"""GET /metrics: Prometheus's text format."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.serve import context
from jaxinfer.serve.metrics import CONTENT_TYPE

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """The server's figures."""
    return Response(context.of(request).metrics.text(), headers={"content-type": CONTENT_TYPE})
