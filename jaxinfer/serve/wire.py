"""The answers' shapes, as msgspec structs (an encoded chunk costs well under a microsecond), and the framing of server-sent events.

Fields that OpenAI's schema requires are always there, null where they have no value; `usage` of a chunk appears only when the client
asked for it. This file does not know where the values come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
EVENT_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
LOWEST_LOGPROB = -9999.0  # JSON has no -Infinity

_ENCODER = msgspec.json.Encoder()


class Usage(msgspec.Struct):
    """Tokens of a call: prompts counted once however many choices they have."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(msgspec.Struct):
    """One alternative of a chat token."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    """One token of a chat message with its alternatives, most likely first."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """The logprobs of a chat choice or chunk."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """The logprobs of a text choice or chunk, as parallel lists; `top_logprobs` holds the token itself too.

    Numbers are null for the first token of an echoed prompt.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(msgspec.Struct):
    """What the model thought of one token at one place of the prompt, in vLLM's form."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None] | msgspec.UnsetType
TokenIds = list[int] | msgspec.UnsetType


class Delta(msgspec.Struct, omit_defaults=True):
    """What a chunk adds to a message."""

    role: str | None = None
    content: str | None = None


class ChatChunkChoice(msgspec.Struct):
    """One choice's share of a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: TokenIds = msgspec.UNSET


class ChatChunk(msgspec.Struct):
    """One event of a chat stream."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    object: str = "chat.completion.chunk"
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    prompt_token_ids: TokenIds = msgspec.UNSET


class ChatMessage(msgspec.Struct):
    """A whole message of the assistant."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    """One whole choice."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | int | None = None
    token_ids: TokenIds = msgspec.UNSET


class ChatCompletion(msgspec.Struct):
    """A whole chat answer."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    prompt_logprobs: PromptLogprobs = msgspec.UNSET
    prompt_token_ids: TokenIds = msgspec.UNSET


class CompletionChoice(msgspec.Struct):
    """One choice of a text answer, whole or in part."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs = msgspec.UNSET
    prompt_token_ids: TokenIds = msgspec.UNSET
    token_ids: TokenIds = msgspec.UNSET


class Completion(msgspec.Struct):
    """A text answer, or one event of its stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    object: str = "text_completion"
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


def event(value: Any) -> bytes:
    """One server-sent event; `value` is a struct or JSON that is encoded already."""
    data = value if isinstance(value, bytes) else _ENCODER.encode(value)
    return b"data: " + data + b"\n\n"


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer that holds one struct or plain value."""
    return Response(_ENCODER.encode(value), status, headers, "application/json")
