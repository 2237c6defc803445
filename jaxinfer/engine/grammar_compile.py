"""From a grammar to llguidance's matcher, with every limit on the way; may be slow, or never return, for a hostile grammar.

`compiled` translates a grammar to llguidance's own form, builds the matcher and looks at its first mask, so that a grammar that
matches nothing is found at once. `endless` finds schemas whose references lead round in a circle. Both run in a process that can be
killed before they run anywhere else (see `grammar_trial.py`). This file does not know about processes, sequences or batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from jaxinfer.grammar import Grammar, GrammarKind

# One blank, or a line break and its indentation: JSON as people and models write it, without room to write blanks for ever.
WHITESPACE = r"\x20|\n\x20{0,16}"
MAX_MESSAGE = 300
MAX_LEXER_STATES = 20_000  # 1 to 2 kB each, per sequence


class GrammarProblem(ValueError):
    """A grammar that cannot be used; the message says why, in words for its author."""


def tokenizer_of(text: str, eos: Sequence[int], vocab: int) -> LLTokenizer:
    """llguidance's view of a tokenizer (its whole JSON text); a mask has a bit for each of `vocab` ids, those without a token are 0.

    Raises:
        GrammarProblem: a kind of tokenizer that llguidance does not know.
    """
    try:
        return LLTokenizer(text, n_vocab=vocab, eos_token=list(eos))
    except Exception as error:  # the library raises plain Exception
        raise GrammarProblem(f"structured output does not work with this model's tokenizer: {_short(str(error))}") from None


def compiled(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """The matcher before the first token; copy it for each sequence.

    Raises:
        GrammarProblem: it is wrong, it needs what llguidance does not have, or no text matches it.
    """
    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    try:
        matcher = LLMatcher(tokenizer, _translated(grammar), log_level=0, limits=limits)
    except ValueError as error:
        raise GrammarProblem(_short(str(error))) from None
    if matcher.is_error():
        raise GrammarProblem(_short(matcher.get_error()))
    first = matcher.deep_copy()
    mask = first.compute_bitmask()
    if first.is_error() or not any(mask):
        raise GrammarProblem("no text matches it")
    return matcher


def endless(schema: Any) -> str | None:
    """A reference of a JSON schema that no finite value satisfies, such as {"$ref": "#"} or a tree whose every node must have a
    child; None if there is none.

    The finite ones are found as a least fixed point: a reference is finite once it is so with what is known to be finite already.
    Pointers into the schema are followed; others are left to llguidance.
    """
    targets = {"#": schema} | {ref: _target(schema, ref) for ref in _references(schema)}
    finite: set[str] = set()
    while found := {ref for ref in targets.keys() - finite if _is_finite(targets[ref], finite)}:
        finite |= found
    return min(targets.keys() - finite, default=None)


def _translated(grammar: Grammar) -> str:
    if grammar.kind in (GrammarKind.JSON_SCHEMA, GrammarKind.JSON_OBJECT):
        schema = grammar.text or '{"type": "object"}'
        return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})
    if grammar.kind is GrammarKind.CHOICE:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in json.loads(grammar.text)))
    if grammar.kind is GrammarKind.REGEX:
        return LLMatcher.grammar_from_regex(grammar.text)
    return grammar_from("grammar", grammar.text)


def _short(message: str) -> str:
    """A message on one line, without llguidance's report of its own state."""
    line = " ".join(message.split("<non-verbose/>")[0].split()) or "it cannot be compiled"
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 3] + "..."


def _references(schema: Any) -> Iterator[str]:
    level = [schema]
    while level:
        item = level.pop()
        inside = list(item.values()) if isinstance(item, dict) else item if isinstance(item, list) else []
        level.extend(inside)
        if isinstance(item, dict) and isinstance(item.get("$ref"), str) and item["$ref"].startswith("#"):
            yield item["$ref"]


def _target(schema: Any, reference: str) -> Any:
    """What a JSON pointer (RFC 6901) names; True (anything) where it names nothing."""
    value = schema
    for part in reference.removeprefix("#").split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key[:6]) < len(value):
            value = value[int(key)]
        else:
            return True
    return value


def _is_finite(schema: Any, finite: set[str]) -> bool:
    """Whether a value of finite size can satisfy a schema, as far as its references can say; `finite` are the references that do."""
    if not isinstance(schema, dict):
        return True
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#") and reference not in finite:
        return False
    for name in ("anyOf", "oneOf"):
        if _listed(schema, name) and not any(_is_finite(arm, finite) for arm in schema[name]):
            return False
    return all(_is_finite(part, finite) for part in (*_listed(schema, "allOf"), *_needed(schema)))


def _needed(schema: Mapping[str, Any]) -> Iterator[Any]:
    """The schemas of what an object or an array must hold."""
    kind, properties, items = schema.get("type"), schema.get("properties"), schema.get("items")
    if kind in ("object", ["object"]):
        named = properties if isinstance(properties, dict) else {}
        for name in _listed(schema, "required"):
            if isinstance(name, str):
                yield named.get(name, schema.get("additionalProperties", True))
    least = schema.get("minItems", 0)
    if kind in ("array", ["array"]) and type(least) is int and least > 0:
        first = _listed(schema, "prefixItems")
        yield from first[:least]
        if least > len(first):
            yield items


def _listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []
