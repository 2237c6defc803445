"""From a request body to what the engine takes: `SamplingParams` and one `Request` for each sequence, everything validated here.

A call's life in `call_of` (slow for long prompts, so the caller runs it in a thread): its fields become sampling parameters over the
model's defaults (`sampling`), its prompts token ids (`tokens_of_prompts`, `tokens_of_chat`), and `build` joins both and checks
them against vocabulary and context. This file does not know about HTTP, streams or the engine's thread.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from jaxinfer.request import MAX_LOGPROBS, FinishReason, Output, Request, SamplingParams, choices
from jaxinfer.serve import structured
from jaxinfer.serve.errors import ApiError, refused
from jaxinfer.serve.schema import ChatBody, CompletionBody, Sampling, TokenizeChatBody
from jaxinfer.tokenizer import Tokenizer

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize", "self"})
_PASSED = (
    "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "max_tokens",
    "min_tokens", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "n",
    "bad_words", "allowed_token_ids", "prompt_logprobs",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What the model allows: ids below `vocab_size`, prompt plus output within `max_model_len` tokens."""

    vocab_size: int
    max_model_len: int


@dataclass(frozen=True)
class Call:
    """One validated request of a client: `prompts` as token ids, and its `sequences`, prompt by prompt, choice by choice.

    echo: for each prompt the text that comes before its output. logprobs, prompt_logprobs: alternatives to be shown, None for no
    logprobs at all. token_ids: whether ids are shown. scoring: nothing but the prompt is shown.
    """

    id: str
    model: str
    created: int
    prompts: tuple[tuple[int, ...], ...]
    sequences: tuple[Request, ...]
    echo: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    token_ids: bool = False
    scoring: bool = False

    @cached_property
    def index_of(self) -> dict[tuple[str, int], int]:
        """The choice that each sequence is."""
        return {request.key: i for i, request in enumerate(self.sequences)}

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(len(prompt) for prompt in self.prompts)

    def echo_of(self, choice: int) -> str:
        """The text that comes before a choice's output."""
        return self.echo[choice * len(self.prompts) // len(self.sequences)] if self.echo else ""

    def outputs(self, batch: Sequence[Output]) -> Iterator[tuple[int, Output]]:
        """What the client may see of a step's outputs, each with its choice. Scoring takes a token too, which is not shown."""
        for output in batch:
            choice = self.index_of[output.request_id, output.index]
            if self.scoring and output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                shown = {"text": "", "token_ids": (), "logprobs": (), "output_tokens": 0, "stop_reason": None}
                output = replace(output, **shown, finish_reason=FinishReason.LENGTH)
            yield choice, output


@dataclass(frozen=True)
class Ready:
    """A body's prompts as token ids, and as texts where they are to be echoed."""

    prompts: tuple[tuple[int, ...], ...]
    echo: tuple[str, ...] = ()


def limits_of(engine: Any) -> Limits:
    """The limits of a loaded engine."""
    return Limits(engine.tokenizer.vocab_size, engine.info.max_model_len)


def call_of(body: CompletionBody | ChatBody, engine: Any, model: str) -> Call:
    """Everything that lies between a body and a call (slow).

    Raises:
        ApiError, RequestError, TokenizerError: the request cannot be honoured.
    """
    limits = limits_of(engine)
    params = sampling(body, engine.defaults, limits)
    chat = isinstance(body, ChatBody)
    ready = tokens_of_chat(body, engine.tokenizer) if chat else tokens_of_prompts(body, engine.tokenizer, limits)
    return build(body, ready, params, model=model, limits=limits)


def tokens_of_prompts(body: CompletionBody, tokenizer: Tokenizer, limits: Limits) -> Ready:
    """Token ids of a text completion's prompts.

    Raises:
        ApiError: 400, a token id that the model does not have.
    """
    special = body.add_special_tokens is not False
    prompts = tuple(tuple(tokenizer.encode(p, special=special)) if isinstance(p, str) else tuple(p) for p in body.prompt)
    for prompt in prompts:
        check_tokens("prompt", prompt, limits.vocab_size)
    if not body.echo:
        return Ready(prompts)
    return Ready(prompts, tuple(p if isinstance(p, str) else tokenizer.decode(p) for p in body.prompt))


def tokens_of_chat(body: ChatBody | TokenizeChatBody, tokenizer: Tokenizer) -> Ready:
    """Token ids of a rendered conversation.

    Raises:
        ApiError: 400, fields that contradict each other.
        TokenizerError: the template refuses the messages.
    """
    text = render(body, tokenizer)
    return Ready((tuple(tokenizer.encode(text, special=bool(body.add_special_tokens))),))


def render(body: ChatBody | TokenizeChatBody, tokenizer: Tokenizer) -> str:
    """The conversation's text. A developer is a system to the templates; a final message to be continued loses its end mark."""
    variables = body.chat_template_kwargs or {}
    for name in variables:
        if name in _RESERVED or not name.isidentifier():
            raise refused("chat_template_kwargs", "chat_template_kwargs may not set the template's own variables; use the request's fields")
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    for message in messages:
        message["role"] = "system" if message["role"] == "developer" else message["role"]
        message.setdefault("content", "")
    prompted = body.add_generation_prompt
    if not body.continue_final_message:
        return tokenizer.render_chat(messages, add_generation_prompt=prompted is not False, **variables)
    if prompted:
        raise refused("continue_final_message", "continue_final_message and add_generation_prompt exclude each other; set one of them")
    text = tokenizer.render_chat(messages, add_generation_prompt=False, **variables)
    return _without_end(text, messages[-1]["content"])


def _without_end(text: str, final: str) -> str:
    """Cut a rendered conversation right after its last message (with the message's own blanks where the template keeps them)."""
    start = text.rfind(final.strip())
    if not final.strip() or start < 0:
        raise refused("continue_final_message", "the final message cannot be continued: it is empty, or the chat template changes it")
    kept = final.lstrip() if text.startswith(final.lstrip(), start) else final.strip()
    return text[: start + len(kept)]


def sampling(body: CompletionBody | ChatBody, defaults: Mapping[str, Any], limits: Limits) -> SamplingParams:
    """How to sample: the request's fields over the model's defaults. This is the one place where they are validated.

    Raises:
        ApiError, RequestError: 400 with the field's name.
    """
    _check_choices(body)
    values = {**defaults, **{name: getattr(body, name) for name in _PASSED if getattr(body, name) is not None}}
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        values["max_tokens"] = body.max_completion_tokens
    if body.logit_bias:
        values["logit_bias"] = {_token_key(key): bias for key, bias in body.logit_bias.items()}
    logprobs = _logprobs(body)
    if logprobs is not None:
        values["logprobs"] = logprobs
    if (found := structured.asked(body)) is not None:
        values["grammar"] = found.grammar
    if _echoes_logprobs(body):
        values["prompt_logprobs"] = max(body.prompt_logprobs or 0, logprobs or 0)
    if _scores(body):
        values["max_tokens"] = 1
    params = SamplingParams.of(**values)
    check_tokens("allowed_token_ids", params.allowed_token_ids or (), limits.vocab_size)
    check_tokens("logit_bias", params.logit_bias, limits.vocab_size)
    check_tokens("stop_token_ids", params.stop.token_ids, limits.vocab_size)
    return params


def _check_choices(body: Sampling) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise refused("best_of", "best_of must equal n: ranking more candidates than are returned is not supported")
    if body.stream_options is not None and not body.stream:
        raise refused("stream_options", "stream_options is only allowed when stream is true")
    if body.prompt_logprobs is not None and body.stream:
        raise refused("prompt_logprobs", "prompt_logprobs cannot be streamed; leave stream out")
    if body.priority is not None and abs(body.priority) >= 2**31:
        raise refused("priority", "priority must be a 32-bit integer")


def _logprobs(body: CompletionBody | ChatBody) -> int | None:
    if isinstance(body, CompletionBody):
        return body.logprobs
    asked = body.top_logprobs or 0
    if not 0 <= asked <= MAX_LOGPROBS:
        raise refused("top_logprobs", f"top_logprobs must be between 0 and {MAX_LOGPROBS}")
    if asked and not body.logprobs:
        raise refused("top_logprobs", "top_logprobs needs logprobs: true")
    return asked if body.logprobs else None


def _echoes_logprobs(body: CompletionBody | ChatBody) -> bool:
    return isinstance(body, CompletionBody) and bool(body.echo) and body.logprobs is not None


def _scores(body: CompletionBody | ChatBody) -> bool:
    """Whether the prompt alone is wanted: the engine draws a token nevertheless, since a sequence ends with one."""
    return isinstance(body, CompletionBody) and bool(body.echo) and body.max_tokens == 0


def _token_key(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 10):
        raise refused("logit_bias", "logit_bias maps token ids to numbers; each key must be a non-negative integer")
    return int(key)


def check_tokens(param: str, tokens: Sequence[int] | Mapping[int, Any], vocab_size: int) -> None:
    """Check that ids are the model's own.

    Raises:
        ApiError: 400, naming the field.
    """
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        raise refused(param, f"{param} holds a token id outside 0..{vocab_size - 1}, the model's vocabulary")


def build(body: CompletionBody | ChatBody, ready: Ready, params: SamplingParams, *, model: str, limits: Limits) -> Call:
    """Join prompts and parameters into a call with ids of the server's own making.

    Raises:
        ApiError: 400, a prompt that cannot fit.
        RequestError: an empty prompt.
    """
    chat = isinstance(body, ChatBody)
    call_id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
    asked = params.max_tokens is not None
    if not asked and not chat:
        params = replace(params, max_tokens=max(COMPLETION_MAX_TOKENS, params.min_tokens))
    sequences: list[Request] = []
    for i, prompt in enumerate(ready.prompts):
        room = _room(prompt, params.max_tokens if asked else None, limits.max_model_len, "messages" if chat else "prompt")
        fitted = params if asked or params.max_tokens is None else replace(params, max_tokens=min(params.max_tokens, room))
        sequences += choices(Request(f"{call_id}-{i}", prompt, fitted, priority=body.priority or 0, cache_salt=body.cache_salt or ""))
    return Call(
        call_id, model, int(time.time()), ready.prompts, tuple(sequences), ready.echo, params.logprobs,
        prompt_logprobs=body.prompt_logprobs, token_ids=bool(body.return_token_ids), scoring=_scores(body),
    )  # fmt: skip


def _room(prompt: Sequence[int], wanted: int | None, context: int, param: str) -> int:
    """Tokens that a prompt leaves for its output; refused if none or fewer than were asked for."""
    room = context - len(prompt)
    if room < 1 or (wanted is not None and wanted > room):
        asked = f" and {wanted} of output were asked for" if wanted is not None else ""
        message = f"the model's context is {context} tokens; the prompt has {len(prompt)}{asked}; shorten the prompt or lower max_tokens"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    return room


def effective_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling values that a request gets without asking, as users write them."""
    base = {item.name: item.default for item in fields(SamplingParams) if item.name in _PASSED and item.name not in ("stop", "max_tokens")}
    return {**base, **{name: value for name, value in defaults.items() if value is not None}}
