"""From a body's fields to one grammar: each shape that clients send, and refusals that name the field."""

import time

import pytest

from jaxinfer.grammar import Grammar
from jaxinfer.serve import structured
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.schema import CompletionBody
from tests.jaxinfer.engine.test_grammar_trial import HOSTILE

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
HELLO = [{"role": "user", "content": "hello"}]


def asked(**values):
    return structured.asked(CompletionBody(prompt="a", **values))


@pytest.mark.parametrize(
    ("values", "grammar"),
    [
        ({"response_format": {"type": "json_object"}}, Grammar.json_object()),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
            Grammar.json_schema(SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar.json_schema(SCHEMA)),
        ({"structured_outputs": {"json": '{"type": "null"}', "regex": None}}, Grammar.json_schema({"type": "null"})),
        ({"structured_outputs": {"regex": "a+"}}, Grammar.regex("a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Grammar.choice(["a", "b"])),
        ({"structured_outputs": {"grammar": 'start: "a"', "disable_any_whitespace": False}}, Grammar.lark('start: "a"')),
        ({"structured_outputs": {"json_object": True}, "response_format": {"type": "text"}}, Grammar.json_object()),
        ({"guided_json": SCHEMA}, Grammar.json_schema(SCHEMA)),
        ({"guided_regex": "a+"}, Grammar.regex("a+")),
        ({"guided_choice": ["a"]}, Grammar.choice(["a"])),
        ({"guided_grammar": 'root ::= "a"'}, Grammar.lark('root ::= "a"')),
    ],
)
def test_every_way_to_ask(values, grammar):
    found = asked(**values)
    assert found.grammar == grammar and found.field in values


@pytest.mark.parametrize(
    "values", [{}, {"response_format": {"type": "text"}}, {"structured_outputs": {}}, {"structured_outputs": {"json_object": False}}]
)
def test_asking_for_nothing(values):
    assert asked(**values) is None


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "exclude each other"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "exclude each other"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "exclude each other"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", "needs json_schema"),
        ({"guided_choice": []}, "guided_choice", "list of strings"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"structured_outputs": {"regex": "(" * 100}}, "structured_outputs", "64 deep"),
        ({"guided_grammar": "x" * 70_000}, "guided_grammar", "at most 65536"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "whitespace_pattern", "not supported"),
    ],
)
def test_refusals_name_the_field(values, field, words):
    with pytest.raises(ApiError, match=words) as caught:
        asked(**values)
    assert (caught.value.status, caught.value.body.param) == (400, field)


def test_grammars_reach_the_engine(client, live):
    body = {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}}
    assert client.post("/v1/chat/completions", json={**body, "n": 2}).status_code == 200
    assert [request.params.grammar for request in live.fake.seen[-2:]] == [Grammar.json_schema(SCHEMA)] * 2
    assert client.post("/v1/completions", json={"prompt": "a", "guided_choice": ["a"]}).status_code == 200


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}},
            "response_format",
            "Invalid type: nope",
        ),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs", "never ends"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
        ({"guided_grammar": "start: x"}, "guided_grammar", "unknown name"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "grammar"),
        ({"guided_regex": "a", "min_tokens": 3}, "min_tokens", "grammar"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json", ""),
        ({"regex": "a"}, "regex", "structured_outputs"),
    ],
)
def test_bad_grammars_are_400(client, fault, live, values, field, words):
    before = len(live.fake.seen)
    error = fault(client.post("/v1/completions", json={"prompt": "a", **values}), 400, field)
    assert words in error["message"] and len(error["message"]) < 500
    assert len(live.fake.seen) == before, "refused before it is queued"


def test_a_hostile_grammar_holds_up_nobody_else(client, fault, live, monkeypatch):
    monkeypatch.setattr(live.fake.grammars, "_seconds", 0.5)
    monkeypatch.setattr(live.fake.grammars, "_trial", None)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        hostile = pool.submit(client.post, "/v1/completions", json={"prompt": "a", "guided_grammar": HOSTILE.text})
        time.sleep(0.1)
        begun = time.monotonic()
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        assert time.monotonic() - begun < 0.4 and not hostile.done()
        assert "too complex" in fault(hostile.result(), 400, "guided_grammar")["message"]
    live.fake.grammars.close()
