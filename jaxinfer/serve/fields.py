"""Honour or refuse: what becomes of every request field that is known to this family of APIs but has no effect here.

A field that a body model declares is honoured there. A field in `IGNORED` is accepted because leaving it out of account changes
nothing that the client can see. A field in `REFUSED` gets a 400 that names it, unless its value is one that asks for nothing.
Any other field is unknown: accepted, and logged once by its name alone. This file does not know what the honoured fields mean.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jaxinfer.serve.errors import refused

logger = logging.getLogger(__name__)

MAX_UNKNOWN_NAMES = 256

IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier",  # bookkeeping of hosted services
    "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",  # of another kind of cache; ours takes cache_salt
    "request_id",  # ids are made by the server; the header x-request-id is echoed
})  # fmt: skip


class Refusal(NamedTuple):
    """`neutral`: values that ask for nothing and pass (null always does). `advice`: what to do instead."""

    advice: str
    neutral: tuple[Any, ...] = ()


_LATER = "is not supported by this server yet; leave it out"
_CHAT_ONLY = "belongs to /v1/chat/completions; use that route, or leave it out"

REFUSED: Mapping[str, Refusal] = {
    # tools
    "tools": Refusal(_LATER, ([],)),
    "tool_choice": Refusal("needs tools, which this server does not support yet; leave it out", ("none", "auto")),
    "parallel_tool_calls": Refusal("needs tools, which this server does not support yet; leave it out", (True,)),
    "functions": Refusal(_LATER, ([],)),
    "function_call": Refusal(_LATER, ("none",)),
    # structured output
    "guided_decoding_backend": Refusal("cannot be chosen: this server has one; leave it out"),
    "guided_whitespace_pattern": Refusal(_LATER),
    "structural_tag": Refusal(_LATER),
    "json_schema": Refusal("stands inside response_format"),
    "regex": Refusal("stands inside structured_outputs"),
    "ebnf": Refusal("is not a field of this server; use structured_outputs with grammar"),
    # sampling and length
    "use_beam_search": Refusal(_LATER, (False,)),
    "length_penalty": Refusal("belongs to beam search, which is not supported; leave it out", (1, 1.0)),
    "early_stopping": Refusal("belongs to beam search, which is not supported; leave it out", (False,)),
    "logits_processors": Refusal(_LATER, ([],)),
    "truncate_prompt_tokens": Refusal("is not supported by this server yet; shorten the prompt before sending it"),
    "truncation_side": Refusal(_LATER),
    "thinking_token_budget": Refusal(_LATER),
    "reasoning_effort": Refusal("is not supported by this server yet; pass it in chat_template_kwargs or leave it out", ("none",)),
    "reasoning": Refusal(_LATER),
    "include_reasoning": Refusal(_LATER, (True,)),
    "verbosity": Refusal(_LATER, ("medium",)),
    # what the answer holds
    "echo": Refusal("belongs to /v1/completions; leave it out", (False,)),
    "suffix": Refusal(_LATER, ("",)),
    "return_tokens_as_token_ids": Refusal(_LATER, (False,)),
    "spaces_between_special_tokens": Refusal(_LATER, (True,)),
    "modalities": Refusal("other than text is not supported: this server writes text only", (["text"],)),
    "audio": Refusal("is not supported: this server writes text only"),
    "moderation": Refusal(_LATER),
    "prediction": Refusal(_LATER),
    "web_search_options": Refusal(_LATER),
    "return_hidden_states": Refusal(_LATER, (False,)),
    "include_obfuscation": Refusal(_LATER, (False,)),
    "continuous_usage_stats": Refusal(_LATER, (False,)),
    # what goes in
    "chat_template": Refusal("in a request is not allowed; the model's own template is used"),
    "documents": Refusal(_LATER, ([],)),
    "prompt_embeds": Refusal("is not supported; send text or token ids"),
    "input_embeds": Refusal("is not supported; send text or token ids"),
    "mm_processor_kwargs": Refusal("is not supported: this server reads text only", ({},)),
    "media_io_kwargs": Refusal("is not supported: this server reads text only", ({},)),
    "lora_path": Refusal(_LATER),
    "vllm_xargs": Refusal(_LATER, ({},)),
    "kv_transfer_params": Refusal(_LATER),
    # fields of another route
    "messages": Refusal(_CHAT_ONLY),
    "prompt": Refusal("belongs to /v1/completions; use that route, or send messages"),
    "max_completion_tokens": Refusal("belongs to /v1/chat/completions; use max_tokens"),
    "top_logprobs": Refusal("belongs to /v1/chat/completions; use logprobs"),
    "add_generation_prompt": Refusal(_CHAT_ONLY, (False,)),
    "continue_final_message": Refusal(_CHAT_ONLY, (False,)),
    "chat_template_kwargs": Refusal(_CHAT_ONLY, ({},)),
}

STRUCTURED_REFUSED: Mapping[str, Refusal] = {
    "whitespace_pattern": Refusal(_LATER),
    "disable_any_whitespace": Refusal(_LATER, (False,)),
    "disable_additional_properties": Refusal(_LATER, (False,)),
    "disable_fallback": Refusal(_LATER, (False,)),
    "structural_tag": Refusal(_LATER),
}

MESSAGE_REFUSED: Mapping[str, Refusal] = {
    "tool_calls": Refusal(_LATER, ([],)),
    "tool_call_id": Refusal(_LATER),
    "function_call": Refusal(_LATER),
    "audio": Refusal("is not supported: this server reads and writes text only"),
}


def check(values: Mapping[str, Any], honoured: Collection[str], table: Mapping[str, Refusal] = REFUSED) -> None:
    """Refuse the first known field that would be left out of account.

    Raises:
        ApiError: 400, naming the field.
    """
    for name, value in values.items():
        if name in honoured or value is None or name not in table:
            continue
        if not any(type(value) is type(neutral) and value == neutral for neutral in table[name].neutral):
            raise refused(name, f"{name} {table[name].advice}", "unsupported_parameter")


class UnknownFields:
    """Logs each unknown field once, by its name alone; bounded, so that clients cannot fill the memory with names."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def note(self, names: Collection[str]) -> None:
        """Log those of `names` that are in no table and were not met before."""
        for name in names:
            if name in IGNORED or name in REFUSED or name in self._seen or len(self._seen) >= MAX_UNKNOWN_NAMES:
                continue
            self._seen.add(name)
            logger.info("unknown request field %s is ignored", ascii(name[:64]))
