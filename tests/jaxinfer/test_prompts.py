"""Lines are checked one by one; what does not fit is refused or counted."""

import hashlib
import json
import re

import pytest
import tokenizers

from jaxinfer import prompts
from jaxinfer.config import ConfigError
from jaxinfer.tokenizer import Tokenizer
from tests.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()


def read(tmp_path, *lines):
    path = tmp_path / "lines.jsonl"
    path.write_bytes("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode())
    return prompts.read(path)


def encode(tmp_path, *lines, longest=40):
    return prompts.encode(read(tmp_path, *lines), TOKENIZER, longest)


def test_lines_keep_their_numbers(tmp_path):
    found = read(tmp_path, {"prompt": "a"}, "", {"messages": [{"role": "user", "content": "b"}], "completion": "c"}, "")
    assert [(line.number, line.prompt, line.completion) for line in found.lines] == [(1, "a", None), (3, None, "c")]
    assert found.sha256 == hashlib.sha256((tmp_path / "lines.jsonl").read_bytes()).hexdigest() and found.name == "lines.jsonl"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ('"text"', "a JSON str"),
        ("[]", "a JSON list"),
        ({}, 'either "prompt" or "messages"'),
        ({"prompt": "a", "messages": []}, 'either "prompt" or "messages"'),
        ({"prompt": ""}, "prompt must be text"),
        ({"prompt": 3}, "prompt must be text"),
        ({"prompt": "a", "completion": ""}, "completion must be text"),
        ({"prompt": "a", "completions": "b"}, "'completions' means nothing here"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": [{"role": "user"}]}, 'text in "role" and "content"'),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    with pytest.raises(ConfigError, match=f"line 2: .*{re.escape(said)}"):
        read(tmp_path, {"prompt": "a"}, line)


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(ConfigError, match="holds no prompt"):
        read(tmp_path, "", " ")
    with pytest.raises(ConfigError, match="No such file"):
        prompts.read(tmp_path / "none")
    (tmp_path / "latin").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        prompts.read(tmp_path / "latin")


def test_prompts_and_completions_become_tokens(tmp_path):
    plain, chat = encode(tmp_path, {"prompt": "ab", "completion": "cd"}, {"messages": [{"role": "user", "content": "hi"}]})
    assert TOKENIZER.decode(plain.prompt) == "ab" and TOKENIZER.decode(plain.completion) == "cd" and plain.room == 38
    assert chat.prompt_text == "<|user|>hi<|eos|><|assistant|>" and len(chat.prompt) == 5
    assert (chat.completion, chat.given, chat.cut) == ((), None, 0)


def test_tokens_that_span_the_seam_are_cut_apart():
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1, "c": 2, "bc": 3}, merges=[("b", "c")]))
    merging = Tokenizer(core, {})
    assert prompts._continued([0], "a", "bc", merging, special=True) == [3]
    assert prompts._continued([0, 1], "ab", "c", merging, special=True) == [2]


def test_what_is_too_long(tmp_path):
    (cut,) = encode(tmp_path, {"prompt": "abc", "completion": "defghij"}, longest=6)
    assert (TOKENIZER.decode(cut.completion), cut.cut) == ("def", 4)
    with pytest.raises(ConfigError, match=r"line 2: the prompt has 6 tokens, but the context holds 6"):
        encode(tmp_path, {"prompt": "abc"}, {"prompt": "abcdef"}, longest=6)


def test_a_template_that_refuses_names_the_line(tmp_path):
    with pytest.raises(ConfigError, match="line 1: the chat template refuses"):
        encode(tmp_path, {"messages": [{"role": "user", "content": "refuse me"}]})
