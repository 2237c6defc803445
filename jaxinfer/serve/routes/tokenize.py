"""POST /tokenize and /detokenize, GET /tokenizer_info: text to token ids and back, as the completions see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Body
from pydantic import Discriminator, Tag
from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.serve import context, convert, wire
from jaxinfer.serve.schema import DetokenizeBody, TokenizeBody, TokenizeChatBody
from jaxinfer.tokenizer import Tokenizer

router = APIRouter()


def _kind(values: Any) -> str:
    return "a chat" if isinstance(values, TokenizeChatBody) or (isinstance(values, dict) and "messages" in values) else "a text"


AnyTokenizeBody = Annotated[
    Annotated[TokenizeBody, Tag("a text")] | Annotated[TokenizeChatBody, Tag("a chat")], Discriminator(_kind)
]  # fmt: skip


@router.post("/tokenize")
async def tokenize(body: Annotated[AnyTokenizeBody, Body()], request: Request) -> Response:
    """Token ids of a text, or of a conversation after the chat template."""
    server = context.of(request)
    tokenizer = server.engine.engine.tokenizer
    server.check(body)
    tokens, texts = await server.in_thread(lambda: _tokens(body, tokenizer))
    return wire.json_response({"count": len(tokens), "max_model_len": server.limits.max_model_len, "tokens": tokens, "token_strs": texts})


class Tokens(NamedTuple):
    """Token ids and, if asked for, the text of each."""

    ids: Sequence[int]
    texts: list[str] | None


def _tokens(body: TokenizeBody | TokenizeChatBody, tokenizer: Tokenizer) -> Tokens:
    if isinstance(body, TokenizeChatBody):
        ids: Sequence[int] = convert.tokens_of_chat(body, tokenizer).prompts[0]
    else:
        ids = tokenizer.encode(body.prompt, special=body.add_special_tokens is not False)
    return Tokens(ids, [tokenizer.token_text(token) for token in ids] if body.return_token_strs else None)


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    """Text of token ids; special tokens are written out unless `skip_special_tokens`."""
    server = context.of(request)
    server.check(body)
    convert.check_tokens("tokens", body.tokens, server.limits.vocab_size)
    tokenizer = server.engine.engine.tokenizer
    text = await server.in_thread(lambda: tokenizer.decode(body.tokens, skip_special=bool(body.skip_special_tokens)))
    return wire.json_response({"prompt": text})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """The tokenizer's special tokens and chat template."""
    server = context.of(request)
    tokenizer = server.engine.engine.tokenizer
    special = {name: tokenizer.special_text(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids), "pad_token_id": tokenizer.pad_id}
    return wire.json_response({
        "tokenizer_class": "PreTrainedTokenizerFast", **special, **ids, "chat_template": tokenizer.chat_template,
        "vocab_size": tokenizer.vocab_size, "model_max_length": server.limits.max_model_len,
    })  # fmt: skip
