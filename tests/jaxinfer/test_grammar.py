"""What a grammar is: checked when it is made, then immutable."""

import dataclasses

import pytest

from jaxinfer.errors import RequestError
from jaxinfer.grammar import MAX_BYTES, MAX_DEPTH, Grammar, GrammarKind


def nested(depth, kind=list):
    value = 1
    for _ in range(depth):
        value = [value] if kind is list else {"items": value}
    return value


def test_equal_grammars_are_one_key():
    schema = {"type": "string", "enum": ["ä"]}
    assert Grammar.json_schema(schema) == Grammar.json_schema('{"type": "string", "enum": ["ä"]}')
    kept = {Grammar.json_schema(schema): 1, Grammar.regex("a"): 2, Grammar.lark("a"): 3, Grammar.json_object(): 4, Grammar.choice(["a"]): 5}
    assert len(kept) == 5 and kept[Grammar("regex", "a")] == 2
    schema["enum"].append("later")
    assert kept[Grammar(GrammarKind.JSON_SCHEMA, '{"type": "string", "enum": ["ä"]}')] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Grammar.regex("a").text = "b"


def test_depth_is_bounded_at_64():
    assert MAX_DEPTH == 64
    Grammar.json_schema(nested(64, dict))
    Grammar.regex("(" * 64 + "a" + ")" * 64)
    Grammar.regex(r"(a)\(" * 100 + "[(]" * 100)
    for make in (
        lambda: Grammar.json_schema(nested(65, dict)), lambda: Grammar.json_schema(nested(5000, dict)),
        lambda: Grammar.json_schema('{"a":' + "[" * 60_000), lambda: Grammar.regex("(" * 65), lambda: Grammar.lark("start: " + "(" * 65),
    ):  # fmt: skip
        with pytest.raises(RequestError, match="nested more than 64 deep"):
            make()


def test_size_is_bounded_at_64_kib():
    assert MAX_BYTES == 65536
    Grammar.regex("ä" * (MAX_BYTES // 2))
    for make in (
        lambda: Grammar.regex("ä" * (MAX_BYTES // 2) + "a"),
        lambda: Grammar.choice(["a" * MAX_BYTES]),
        lambda: Grammar.lark("a" * 10**6),
    ):
        with pytest.raises(RequestError, match="at most 65536"):
            make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Grammar("xml", "a"), lambda: Grammar.regex(3), lambda: Grammar.regex(""), lambda: Grammar.regex("\ud800"),
        lambda: Grammar.choice("ab"), lambda: Grammar.choice([]), lambda: Grammar.choice(["a", ""]), lambda: Grammar.choice([1]),
        lambda: Grammar.json_schema("[1]"), lambda: Grammar.json_schema("{"), lambda: Grammar.json_schema('{"a": NaN}'),
        lambda: Grammar.json_schema({"a": float("inf")}), lambda: Grammar.json_schema({"a": {1}}), lambda: Grammar.json_schema(True),
        lambda: Grammar(GrammarKind.JSON_OBJECT, "{}"), lambda: Grammar.lark(None),
    ],
)  # fmt: skip
def test_what_is_no_grammar_is_refused(make):
    with pytest.raises(RequestError) as caught:
        make()
    assert caught.value.param == "grammar" and len(str(caught.value)) > 15


def test_tuples_are_lists_of_choices():
    assert Grammar.choice(("a", "b")) == Grammar.choice(["a", "b"])
