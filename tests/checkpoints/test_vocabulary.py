"""The tokenizer loses nothing, and the quick rendering equals the chat template."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from checkpoints import conversations, vocabulary

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def _template() -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(json.loads((DEMO / "tokenizer_config.json").read_text())["chat_template"])


TEMPLATE = _template()


def by_template(messages: list[dict], tools: list[dict], prompt: bool = False) -> str:
    return TEMPLATE.render(messages=messages, tools=tools or None, add_generation_prompt=prompt, bos_token=vocabulary.BOS)


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_survives(text: str):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    if not any(special in text for special in vocabulary.SPECIALS):
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_digits_stand_alone_and_a_text_begins_with_the_begin_token():
    encoding = TOKENIZER.encode("12 + 345")
    assert encoding.ids[0] == vocabulary.BOS_ID
    assert [token for token in encoding.tokens if token.isdigit()] == list("12345")
    assert TOKENIZER.encode("abc", add_special_tokens=False).ids == TOKENIZER.encode("abc").ids[1:]


def test_special_ids():
    assert [TOKENIZER.token_to_id(token) for token in vocabulary.SPECIALS] == list(range(6))
    assert TOKENIZER.decode([vocabulary.END_ID, 4, 5]) == "<tool_call></tool_call>"


def test_rendering_equals_the_chat_template():
    rng = random.Random(3)
    for _ in range(200):
        messages, tools = conversations.conversation(rng)
        assert vocabulary.BOS + "".join(text for _, text in vocabulary.render(messages, tools)) == by_template(messages, list(tools))


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}])
def test_the_template_takes_what_clients_send(arguments: object):
    call = {"id": "1", "type": "function", "function": {"name": "get_time", "arguments": arguments}}
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "How late is it "}, {"type": "text", "text": "in Oslo?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    text = by_template(messages, [], prompt=True)
    assert text == (
        "<|endoftext|><|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHow late is it in Oslo?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "get_time", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n<|im_start|>assistant\n'
    )


def test_training_needs_no_texts(tmp_path: Path):
    tokenizer = vocabulary.train_tokenizer(["the cat and the dog 12"] * 50, 300)
    vocabulary.write_tokenizer(tokenizer, tmp_path)
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.decode(again.encode("thé cat 7", add_special_tokens=False).ids) == "thé cat 7"
