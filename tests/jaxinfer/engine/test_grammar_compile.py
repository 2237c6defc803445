"""Grammars become matchers, or problems in words."""

import json

import pytest

from jaxinfer.engine.grammar_compile import MAX_MESSAGE, GrammarProblem, compiled, endless, tokenizer_of
from jaxinfer.grammar import Grammar
from tests.fakes import byte_tokenizer

BYTES = byte_tokenizer()
TOKENIZER = tokenizer_of(BYTES.to_json(), BYTES.eos_ids, BYTES.vocab_size)


def takes(grammar, text):
    """Whether a text is a whole answer under a grammar."""
    matcher = compiled(grammar, TOKENIZER)
    tokens = BYTES.encode(text, special=False)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


PERSON = Grammar.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False})


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (PERSON, ['{"a":1}', '{"a": 1}', '{\n  "a": 1\n}'], ['{"a": "1"}', "{}", '{"a":  1}', '{"a":1}\n', '{\n\n"a":1}']),
        (Grammar.json_object(), ["{}", '{"x": [1, {"y": null}]}'], ["[]", '"a"', "{"]),
        (Grammar.regex("[0-9]{2}(a|ö)"), ["12a", "00ö"], ["1a", "12ab"]),
        (Grammar.regex("^ab?$"), ["a", "ab"], ["b", "aa"]),
        (Grammar.choice(["yes", 'a "b"\\\n', "\x1b", "🦊", "ye"]), ["yes", "ye", 'a "b"\\\n', "\x1b", "🦊"], ["y", "no"]),
        (Grammar.lark('start: "a" start | "b"'), ["b", "aab"], ["a", "ba"]),
        (Grammar.lark('root ::= "a" x\nx ::= [0-9]+'), ["a1", "a12"], ["a", "1"]),
    ],
)
def test_kinds(grammar, good, bad):
    assert [text for text in good if not takes(grammar, text)] == []
    assert [text for text in bad if takes(grammar, text)] == []


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar.json_schema({"type": "nope"}), "Invalid type: nope"),
        (Grammar.json_schema({"not": {}}), "Unimplemented keys"),
        (Grammar.json_schema({"enum": []}), "Unsatisfiable"),
        (Grammar.json_schema({"$ref": "#"}), "no text matches it"),
        (Grammar.json_schema({"$ref": "http://example.com/schema"}), "does not fetch"),
        (Grammar.json_schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
        (Grammar.json_schema({"type": "string", "pattern": "(a"}), "unclosed group"),
        (Grammar.regex("(a"), "unclosed group"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.lark("start: x"), "unknown name"),
        (Grammar.lark("start: " + "x" * 5000), "unknown name"),
        (Grammar.lark("root ::= ("), "GBNF"),
    ],
)
def test_problems_are_told_shortly(grammar, words):
    with pytest.raises(GrammarProblem, match=words) as caught:
        compiled(grammar, TOKENIZER)
    assert len(str(caught.value)) <= MAX_MESSAGE and "\n" not in str(caught.value) and "verbose" not in str(caught.value)


def test_a_tokenizer_of_another_kind():
    with pytest.raises(GrammarProblem, match="tokenizer"):
        tokenizer_of("{}", [0], 10)


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
ENDLESS = [
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"allOf": [{"type": "object"}, {"$ref": "#"}]},
    {"anyOf": [{"$ref": "#"}]},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["x"]},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1},
    {"type": "null", "$defs": {"node": {**NODE, "required": ["next"]}}, "anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
]
FINITE = [
    {}, {"type": "object", "required": ["a"]}, {"$defs": {"node": NODE}, "$ref": "#/$defs/node"}, {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    {"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, {"type": "array", "items": {"$ref": "#"}},
    {"type": "array", "prefixItems": [{}], "items": {"$ref": "#"}, "minItems": 1}, {"$ref": "#/nowhere/0"}, {"$ref": "other.json#/a"},
    {"type": "array", "items": [{"$ref": "#/items/1"}, {"type": "null"}]}, {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "null"}}},
    {"required": "a", "properties": 3, "anyOf": {}, "$ref": 4, "minItems": "x"},
]  # fmt: skip


def test_circles_without_an_end_are_found():
    assert [schema for schema in ENDLESS if endless(schema) is None] == []


def test_recursion_that_can_end_is_left_alone():
    assert [schema for schema in FINITE if endless(schema) is not None] == []
    tree = {"$defs": {"node": NODE}, "$ref": "#/$defs/node"}
    assert takes(Grammar.json_schema(tree), json.dumps({"next": {"next": {}}}))
