"""POST /v1/chat/completions: answer a conversation."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.serve import context
from jaxinfer.serve.answer import answer
from jaxinfer.serve.forms import ChatForm
from jaxinfer.serve.schema import ChatBody

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat(body: ChatBody, request: Request) -> Response:
    """The assistant's next message, plain or as a stream of events."""
    server = context.of(request)
    call = await server.call(body)
    return await answer(request, server, call, form=ChatForm(call, server.engine.engine.tokenizer), body=body)
