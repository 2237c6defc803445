"""Honour or refuse: each field that the official clients or vLLM know is declared, harmless or refused by name."""

import logging
from typing import get_args, get_type_hints

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params

from jaxinfer.serve import fields
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.schema import ChatBody, CompletionBody

VLLM_FIELDS = (
    "best_of use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids include_stop_str_in_output "
    "ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens prompt_logprobs "
    "allowed_token_ids bad_words echo add_generation_prompt continue_final_message add_special_tokens documents chat_template "
    "chat_template_kwargs mm_processor_kwargs structured_outputs guided_json guided_regex guided_choice guided_grammar "
    "priority request_id logits_processors return_tokens_as_token_ids return_token_ids cache_salt kv_transfer_params "
    "vllm_xargs include_reasoning thinking_token_budget prompt_embeds structural_tag media_io_kwargs reasoning_effort "
)


def known(params, base):
    """Every field of a route that the official client can send."""
    names = set()
    for kind in get_args(params):
        names |= set(kind.__annotations__)
    return names | set(base.__annotations__)


CHAT = known(chat_params.CompletionCreateParams, chat_params.CompletionCreateParamsBase) | set(VLLM_FIELDS.split())
TEXT = known(completion_create_params.CompletionCreateParams, completion_create_params.CompletionCreateParamsBase) | set(
    VLLM_FIELDS.split()
)


@pytest.mark.parametrize(("names", "body"), [(CHAT, ChatBody), (TEXT, CompletionBody)])
def test_every_known_field_is_decided(names, body):
    undecided = names - set(body.model_fields) - fields.IGNORED - set(fields.REFUSED)
    assert not undecided
    assert not fields.IGNORED & set(fields.REFUSED)


@pytest.mark.parametrize("kind", ["chat/completions", "completions"])
def test_every_refused_field_is_refused_over_http(client, fault, kind):
    body = ChatBody if kind.startswith("chat") else CompletionBody
    start = {"messages": [{"role": "user", "content": "hi"}]} if body is ChatBody else {"prompt": "hi"}
    for name in set(fields.REFUSED) - set(body.model_fields):
        error = fault(client.post(f"/v1/{kind}", json={**start, name: {"what": "ever"}}), 400, name)
        assert error["code"] == "unsupported_parameter"
        assert name in error["message"]


@pytest.mark.parametrize("kind", ["chat/completions", "completions"])
def test_every_harmless_value_passes(client, kind):
    body = ChatBody if kind.startswith("chat") else CompletionBody
    start = {"messages": [{"role": "user", "content": "hi"}]} if body is ChatBody else {"prompt": "hi"}
    refused = set(fields.REFUSED) - set(body.model_fields)
    neutral = {name: fields.REFUSED[name].neutral[0] for name in refused if fields.REFUSED[name].neutral}
    nothing = dict.fromkeys(refused - set(neutral))
    ignored = dict.fromkeys(fields.IGNORED, "anything")
    assert client.post(f"/v1/{kind}", json={**start, **neutral, **nothing, **ignored}).status_code == 200


def test_a_neutral_value_must_have_the_very_type():
    fields.check({"use_beam_search": False, "tools": [], "parallel_tool_calls": True}, ())
    for name, value in [("use_beam_search", 0), ("parallel_tool_calls", 1), ("logits_processors", {})]:
        with pytest.raises(ApiError) as caught:
            fields.check({name: value}, ())
        assert caught.value.body.param == name


def test_unknown_fields_are_logged_once_and_by_name_alone(caplog):
    caplog.set_level(logging.INFO, logger=fields.__name__)
    unknown = fields.UnknownFields()
    unknown.note(["novel", "user", "tools", "line\nbreak" + "x" * 100])
    unknown.note(["novel"])
    said = lambda: [record.getMessage() for record in caplog.records if record.name == fields.__name__]
    assert said() == [
        "unknown request field 'novel' is ignored",
        f"unknown request field 'line\\nbreak{'x' * 54}' is ignored",
    ]
    unknown.note([f"n{i}" for i in range(1000)])
    assert len(said()) == fields.MAX_UNKNOWN_NAMES


def test_hints_resolve():
    assert "messages" in get_type_hints(ChatBody)
