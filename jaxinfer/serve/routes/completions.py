"""POST /v1/completions: continue texts or token ids."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.serve import context
from jaxinfer.serve.answer import answer
from jaxinfer.serve.forms import CompletionForm
from jaxinfer.serve.schema import CompletionBody

router = APIRouter()


@router.post("/v1/completions")
async def complete(body: CompletionBody, request: Request) -> Response:
    """Continue one or several prompts, plain or as a stream of events."""
    server = context.of(request)
    call = await server.call(body)
    return await answer(request, server, call, form=CompletionForm(call, server.engine.engine.tokenizer), body=body)
