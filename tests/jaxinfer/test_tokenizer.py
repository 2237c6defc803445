"""Text to ids and back on the embedded model's tokenizer and on one of Llama 2's kind; chat templates as Hugging Face renders them."""

import json
import random
from datetime import datetime
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from jaxinfer.tokenizer import MAX_EOS, Tokenizer, TokenizerError

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
ALPHABET = "abc XYZ.,\n\t\"'<|>{}0189éßñ中文字かなКир€😀👩‍👩‍👧🇩🇪\u0301\ufffd"


@pytest.fixture(scope="module")
def demo():
    return Tokenizer.load(DEMO)


def byte_fallback():
    """A vocabulary with pieces of text, spaces as U+2581, and bytes as <0x..> for everything else, as SentencePiece makes them."""
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + [*"▁abcé", "ab", "▁a"]
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[("a", "b"), ("▁", "a")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    core.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(core, {"bos_token": "<s>", "eos_token": "</s>"})


def texts(seed, count=60):
    draw = random.Random(seed)
    return ["".join(draw.choice(ALPHABET) for _ in range(draw.randint(0, 40))) for _ in range(count)]


def streamed(tokenizer, ids, *, skip_special=True):
    stream = tokenizer.stream(skip_special=skip_special)
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("seed", range(3))
def test_text_survives_the_way_there_and_back(demo, seed):
    for text in texts(seed):
        ids = demo.encode(text, special=False)
        assert demo.decode(ids) == text
        assert b"".join(demo.token_bytes(token) for token in ids) == text.encode()
        assert all(0 <= token < demo.vocab_size for token in ids)


@pytest.mark.parametrize("make", [lambda: Tokenizer.load(DEMO), byte_fallback], ids=["byte-level", "byte-fallback"])
def test_streamed_pieces_join_to_the_plain_text(make):
    tokenizer = make()
    for text in texts(7):
        ids = tokenizer.encode(text, special=False)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids) == text
        assert all(piece == "" or not piece.endswith("\ufffd") or "\ufffd" in text for piece in pieces)


def nonsense(tokenizer, seed, count=300):
    draw = random.Random(seed)
    return [[draw.randrange(tokenizer.vocab_size) for _ in range(draw.randint(1, 20))] for _ in range(count)]


def test_streamed_nonsense_joins_to_the_plain_nonsense(demo):
    for ids in nonsense(demo, 3):
        assert "".join(streamed(demo, ids)) == demo.decode(ids), ids


def test_bytes_that_form_no_character_break_no_stream():
    tokenizer = byte_fallback()
    for ids in nonsense(tokenizer, 5):
        pieces = streamed(tokenizer, [*ids, *tokenizer.encode("abc abc", special=False)])
        assert "".join(pieces).endswith(" abc abc"), ids


@pytest.mark.parametrize("skip_special", [True, False])
def test_endless_runs_without_a_character_are_not_held_for_ever(demo, skip_special):
    stray = next(token for token in range(demo.vocab_size) if demo.token_bytes(token) == b"\x80")
    for token in (stray, demo.eos_ids[0]):
        pieces = streamed(demo, [token] * 200 + demo.encode(" end", special=False), skip_special=skip_special)
        assert "".join(pieces) == demo.decode([token] * 200, skip_special=skip_special) + " end"
        assert all(len(piece) <= 20 * 64 for piece in pieces)


def test_a_character_comes_whole(demo):
    ids = demo.encode("a😀b", special=False)
    pieces = streamed(demo, ids)
    assert "😀" in pieces or "a😀" in pieces or "😀b" in pieces
    assert "".join(streamed(demo, ids[:-2])[:-1]) + streamed(demo, ids[:-2])[-1] == demo.decode(ids[:-2])


def test_special_tokens_are_skipped_or_shown(demo):
    eos = demo.eos_ids[0]
    ids = [*demo.encode("Hi", special=False), eos, *demo.encode(" there", special=False)]
    assert "".join(streamed(demo, ids)) == demo.decode(ids) == "Hi there"
    assert "".join(streamed(demo, ids, skip_special=False)) == demo.decode(ids, skip_special=False) == "Hi<|im_end|> there"


def test_the_embedded_model_names_its_special_tokens(demo):
    assert demo.vocab_size == 8192
    assert demo.bos_id == 0
    assert demo.pad_id == 3
    assert demo.eos_ids == (2, 0)
    assert demo.special_text("eos_token") == "<|im_end|>"
    assert demo.special_text("unk_token") is None
    assert demo.token_bytes(2) == b"<|im_end|>"


def test_special_adds_what_the_tokenizer_itself_adds(demo):
    plain, special = demo.encode("Hello", special=False), demo.encode("Hello")
    assert special[-len(plain) :] == plain
    assert special == [*special[: len(special) - len(plain)], *plain]


def test_one_token_alone_keeps_its_space_and_its_bytes(demo):
    the = demo.encode("in the", special=False)[-1]
    assert demo.token_text(the) == " the"
    first = demo.encode("😀", special=False)[0]
    assert demo.token_text(first).encode() == demo.token_bytes(first).decode(errors="replace").encode()
    tokenizer = byte_fallback()
    assert [tokenizer.token_bytes(token) for token in tokenizer.encode("a é😀", special=False)][-6:] == [
        b" ", "é".encode(), *[bytes([byte]) for byte in "😀".encode()]
    ]  # fmt: skip


def test_an_id_past_the_vocabulary_is_no_text(demo):
    assert demo.token_bytes(10**6) == b""
    assert streamed(demo, [10**6]) == ["", ""]


def test_flush_leaves_nothing(demo):
    stream = demo.stream(skip_special=True)
    stream.push(demo.encode("😀", special=False)[0])
    stream.flush()
    assert stream.flush() == ""


def test_the_whole_tokenizer_travels_as_json(demo):
    again = tokenizers.Tokenizer.from_str(demo.to_json())
    assert again.encode("a b").ids == demo.encode("a b")


# Folders


FILES = {"settings": "tokenizer_config.json", "generation": "generation_config.json", "config": "config.json"}


def folder(tmp_path, **files):
    tmp_path.joinpath("tokenizer.json").write_text(byte_fallback().to_json())
    for name, value in files.items():
        path = tmp_path / FILES.get(name, name)
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return tmp_path


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({}, ()),
        ({"settings": {"eos_token": "</s>"}}, (2,)),
        ({"settings": {"eos_token": {"content": "</s>"}}}, (2,)),
        ({"generation": {"eos_token_id": 0}, "config": {"eos_token_id": 5}}, (0,)),
        ({"generation": {}, "config": {"eos_token_id": 5}}, (5,)),
        ({"generation": {"eos_token_id": [7, 2]}, "settings": {"eos_token": "</s>"}}, (7, 2)),
        ({"generation": {"eos_token_id": None}, "settings": {"eos_token": None}}, ()),
    ],
)
def test_end_of_sequence_ids_come_from_all_places(tmp_path, files, eos):
    assert Tokenizer.load(folder(tmp_path, **files)).eos_ids == eos


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"settings": "{"}, "tokenizer_config.json is not valid JSON"),
        ({"settings": "[" * 100_000}, "tokenizer_config.json is not valid JSON"),
        ({"settings": "[]"}, "tokenizer_config.json holds no JSON object"),
        ({"settings": {"eos_token": 5}}, "special token is int"),
        ({"settings": {"chat_template": {"a": "b"}}}, "chat_template is dict"),
        ({"generation": {"eos_token_id": "2"}}, "eos_token_id must be"),
        ({"generation": {"eos_token_id": [-1]}}, "eos_token_id must be"),
        ({"generation": {"eos_token_id": list(range(MAX_EOS + 1))}}, "eos_token_id must be"),
        ({"tokenizer.json": "{}"}, "tokenizer.json of .* cannot be read"),
        ({"tokenizer.json": "nonsense"}, "tokenizer.json of .* cannot be read"),
    ],
)
def test_broken_folders_give_one_clear_error(tmp_path, files, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(folder(tmp_path, **files))


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    folder(tmp_path).joinpath("tokenizer_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_template_file_wins_and_named_templates_have_a_default(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert Tokenizer.load(folder(tmp_path, settings={"chat_template": named})).chat_template == "plain"
    assert Tokenizer.load(folder(tmp_path, **{"chat_template.jinja": "file"})).chat_template == "file"


# Chat templates


def render(template, messages=(), **variables):
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.BPE()), {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})
    return tokenizer.render_chat([{"role": role, "content": content} for role, content in messages], **variables)


TALK = [("system", "Be brief."), ("user", "Hi <b>"), ("assistant", "Hello"), ("user", "Bye")]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL = """{%- if messages[0]['role'] == 'system' -%}
    {%- set system_message = messages[0]['content'] -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('After the optional system message, roles must alternate') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {%- if loop.first and system_message is defined -%}
            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' -}}
        {%- else -%}
            {{- '[INST] ' + message['content'] + ' [/INST]' -}}
        {%- endif -%}
    {%- else -%}
        {{- ' ' + message['content'] | trim + eos_token -}}
    {%- endif -%}
{%- endfor -%}"""
QWEN = """{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string and not message.content.startswith('<tool') %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if loop.index0 > ns.last %}{%- break %}{%- endif %}
    {%- if message.role == "assistant" %}
        {{- message.content.split('</think>')[-1].lstrip('\\n') }}
        {%- continue %}
    {%- endif %}
    {{- '<' + message.role + '>' + message.content + (loop.last and '!' or '') }}
{%- endfor %}"""


def test_chatml():
    assert render(CHATML, TALK[2:]) == "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, TALK[3:], add_generation_prompt=False) == "<|im_start|>user\nBye<|im_end|>\n"


def test_mistral_alternates():
    assert render(MISTRAL, TALK) == "<s>[INST] Be brief.\n\nHi <b> [/INST] Hello</s>[INST] Bye [/INST]"
    with pytest.raises(TokenizerError, match="roles must alternate"):
        render(MISTRAL, [("user", "a"), ("user", "b")])


def test_qwen_uses_namespaces_and_loop_controls():
    talk = [("user", "a"), ("assistant", "<think>no</think>\nyes"), ("user", "b")]
    assert render(QWEN, talk) == "<user>ayes<user>b!"


@pytest.mark.parametrize(
    ("template", "variables", "text"),
    [
        ("{{ strftime_now('%Y') }}", {}, str(datetime.now().year)),
        ("{{ date_string if date_string is defined else 'none' }}", {"date_string": "today"}, "today"),
        ("{%- if tools is not none %}{{ tools | tojson }}{% endif %}", {"tools": [{"n": "f", "d": "<é>"}]}, '[{"n": "f", "d": "<é>"}]'),
        ("{{ tools[0] | tojson(indent=2) }}", {"tools": [{"a": 1}]}, '{\n  "a": 1\n}'),
        ("{{ tools[0] | tojson(ensure_ascii=True) }}", {"tools": [{"a": "é"}]}, '{"a": "\\u00e9"}'),
        ("{{ tools[0] | tojson(separators=(',', ':'), sort_keys=true) }}", {"tools": [{"b": 1, "a": 2}]}, '{"a":2,"b":1}'),
        ("{{ tools is none }}", {"tools": []}, "True"),
        ("{% generation %}{{ 'kept' }}{% endgeneration %}!", {}, "kept!"),
        ("{% for x in [1, 2] %}{% generation %}{% set y = x %}{{ y }}{% endgeneration %}{% endfor %}", {}, "12"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", {}, "a\nb\nc"),
        ("{{ enable_thinking is defined and enable_thinking is false }}", {"enable_thinking": False}, "True"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('y') }}{{ {'b': 1} | items | list }}", {}, "[y][('b', 1)]"),
        ("{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}", {}, "<s></s>False"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('+') }}", {}, "Hi <b>+Bye"),
        ("{{ messages[0].missing is none or messages[0].missing is not defined }}", {}, "True"),
        ("{{ bos_token }}", {"bos_token": "mine"}, "mine"),
    ],
)
def test_what_famous_templates_rely_on(template, variables, text):
    assert render(template, TALK, **variables) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ range(10000000) | list }}",
        "{% include 'secret' %}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ raise_exception('no') }}",
        "{% if %}",
        "{% generation %}",
        "{{ strftime_now(5) }}",
        "{{ messages | tojson(indent='x', nonsense=1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_templates_render_in_a_sandbox_and_fail_cleanly(template):
    with pytest.raises(TokenizerError, match="chat template"):
        render(template, TALK)


def test_a_conversation_may_not_render_without_end():
    with pytest.raises(TokenizerError, match="at most"):
        render("{% for i in range(20) %}{{ messages[0].content }}{% endfor %}", [("user", "x" * 1_000_000)])


def test_a_model_without_a_template_says_so():
    with pytest.raises(TokenizerError, match="no chat template"):
        render(None, TALK)


@pytest.mark.parametrize("name", ["messages", "self", "raise_exception", "template"])
def test_variables_never_replace_the_conversation(name):
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.BPE()), {"chat_template": "{{ messages[0].content }}{{ tools is none }}"})
    assert tokenizer.render_chat([{"content": "Hi"}], **{name: "mine"}) == "HiTrue"


def test_the_embedded_model_talks(demo):
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    text = demo.render_chat(messages)
    assert text == "<|endoftext|><|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert demo.encode(text, special=False)[:2] == [0, 1]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    with_tools = demo.render_chat(messages, tools=tools)
    assert '{"name": "add", "parameters": {"type": "object"}}' in with_tools
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>' in demo.render_chat([*messages, call])
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is 2 + 2?"}]}]
    assert demo.render_chat(parts) == text
