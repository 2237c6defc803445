"""What clients may send, as pydantic models: types alone. Ranges are checked where the values are used (`request.py`, `convert.py`).

Strict: a number is not a string, true is not 1. Fields that are not declared here pass through `fields.check`, which refuses those
that are known but have no effect. This file does not know the model or its tokenizer.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from jaxinfer.serve import fields
from jaxinfer.serve.errors import refused

MAX_PROMPTS = 128
MAX_MESSAGES = 2048
MAX_PARTS = 256

Role = Literal["system", "developer", "user", "assistant"]


class Body(BaseModel):
    """A request body; fields that it does not declare are kept in `model_extra` once `fields.check` has passed them."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=())
    table: ClassVar[Any] = fields.REFUSED

    @model_validator(mode="before")
    @classmethod
    def honour_or_refuse(cls, values: Any) -> Any:
        """Refuse known fields that would be left out of account."""
        if isinstance(values, dict):
            fields.check(values, cls.model_fields, cls.table)
        return values


def _prompts(value: Any) -> list[str | list[int]]:
    """One list of prompts, each a text or token ids, out of the four forms that a prompt may have."""
    prompts = [value] if isinstance(value, str) or _is_tokens(value) else value
    texts = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
    if not prompts or not (texts or (isinstance(prompts, list) and all(_is_tokens(prompt) for prompt in prompts))):
        raise refused("prompt", "prompt must be a string, a list of strings, a list of token ids or a list of such lists, not empty")
    if len(prompts) > MAX_PROMPTS:
        raise refused("prompt", f"prompt has {len(prompts)} entries; at most {MAX_PROMPTS} are supported in one call")
    return prompts


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


_TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        _TOKENS_SCHEMA,
        {"type": "array", "items": _TOKENS_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}
Prompts = Annotated[Any, AfterValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]


def _content(value: Any) -> str | None:
    """A message's text: a string, or parts that are all text, joined by line breaks. What is not text is refused by its type."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) > MAX_PARTS:
        raise refused("messages", f"a message's content must be a string or a list of at most {MAX_PARTS} parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
            name = kind[:40] if isinstance(kind, str) and kind.isidentifier() else "unknown"
            message = f"a content part of type {name} is not supported: this model reads text parts only"
            raise refused("messages", message, "unsupported_content")
        texts.append(text)
    return "\n".join(texts)


_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]}
Content = Annotated[Any, AfterValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)]


class Message(Body):
    """One message of a conversation; other fields (`name`, `reasoning_content`, ...) reach the chat template as they are."""

    table: ClassVar[Any] = fields.MESSAGE_REFUSED
    role: Role
    content: Content = None


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class StreamOptions(Body):
    """How a stream ends: with `include_usage` an extra chunk without choices carries the usage."""

    include_usage: bool | None = None


class NamedSchema(Body):
    """OpenAI's wrapper of a JSON schema. Answers keep to the schema whether it is `strict` or not."""

    table: ClassVar[Any] = {}
    name: str | None = None
    description: str | None = None
    content: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Plain text, any JSON object, or JSON under a schema."""

    table: ClassVar[Any] = {}
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(Body):
    """vLLM's form: one of its fields says what the answer looks like."""

    table: ClassVar[Any] = fields.STRUCTURED_REFUSED
    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Sampling(Body):
    """What both kinds of completion share."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    n: int | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = None
    cache_salt: str | None = None
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = None


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TokenizeBody(Body):
    """POST /tokenize with a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatBody(Body):
    """POST /tokenize with a conversation."""

    model: str | None = None
    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
    skip_special_tokens: bool | None = None
