"""What an output must look like, as a user says it: a JSON schema, a regular expression, a list of choices or a Lark grammar.

A `Grammar` is plain text with a kind: immutable, hashable, and checked for size and nesting when it is made, so that what is compiled
later is of bounded size. This file does not know how grammars are compiled or how they bind a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from jaxinfer.errors import RequestError

MAX_BYTES = 64 << 10
MAX_DEPTH = 64


class GrammarKind(StrEnum):
    """The languages in which a grammar may be written."""

    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICE = "choice"
    LARK = "lark"


@dataclass(frozen=True)
class Grammar:
    """What an output must look like. `text` is the JSON schema, the regular expression, a JSON list of the choices, or the Lark
    grammar (GBNF is read too); it is empty for `json_object`. The class methods build it from plain values.

    Raises:
        RequestError: a text of another form, over 64 KiB, or nested more than 64 deep. Whether it can be compiled shows only later.
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in list(GrammarKind):
            raise RequestError(f"a grammar's kind must be one of {', '.join(GrammarKind)}", "grammar")
        object.__setattr__(self, "kind", GrammarKind(self.kind))
        if not isinstance(self.text, str):
            raise RequestError(f"a grammar's text must be a string, got {type(self.text).__name__}", "grammar")
        size = len(self.text.encode(errors="surrogatepass"))
        if size > MAX_BYTES:
            raise RequestError(f"the {self.kind} has {size} bytes; at most {MAX_BYTES} are supported", "grammar")
        if any("\ud800" <= character <= "\udfff" for character in self.text):
            raise RequestError(f"the {self.kind} holds half of a surrogate pair, which is no text", "grammar")
        if self._depth() > MAX_DEPTH:
            raise RequestError(f"the {self.kind} is nested more than {MAX_DEPTH} deep; flatten it", "grammar")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON that a schema describes; a string is read as the schema's JSON text."""
        return cls(GrammarKind.JSON_SCHEMA, schema if isinstance(schema, str) else _json("a JSON schema", schema))

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls(GrammarKind.JSON_OBJECT)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression matches as a whole."""
        return cls(GrammarKind.REGEX, pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Grammar:
        """One of several texts."""
        return cls(GrammarKind.CHOICE, _json("choices", choices))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Text that a context-free grammar derives."""
        return cls(GrammarKind.LARK, text)

    def _depth(self) -> int:
        """How deep the text is nested; what must be JSON is checked on the way."""
        if self.kind is GrammarKind.JSON_OBJECT:
            if self.text:
                raise RequestError("json_object takes no text", "grammar")
            return 0
        if not self.text:
            raise RequestError(f"the {self.kind} is empty", "grammar")
        if self.kind in (GrammarKind.REGEX, GrammarKind.LARK):
            return _bracket_depth(self.text)
        try:
            value = json.loads(self.text, parse_constant=_not_json)
        except RecursionError:
            return MAX_DEPTH + 1
        except ValueError:
            raise RequestError(f"the {self.kind} is not valid JSON", "grammar") from None
        if self.kind is GrammarKind.JSON_SCHEMA and not isinstance(value, dict):
            raise RequestError(f"a JSON schema must be an object, got {type(value).__name__}", "grammar")
        if self.kind is GrammarKind.CHOICE and not (isinstance(value, list) and value and all(c and isinstance(c, str) for c in value)):
            raise RequestError("choice must be a list of strings, none of them empty", "grammar")
        return _json_depth(value)


def _json(what: str, value: Any) -> str:
    plain = dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
    try:
        return json.dumps(plain, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise RequestError(f"{what} is nested more than {MAX_DEPTH} deep; flatten it", "grammar") from None
    except (TypeError, ValueError) as error:
        raise RequestError(f"{what} must be made of plain JSON values: {str(error)[:80]}", "grammar") from None


def _not_json(constant: str) -> None:
    raise ValueError(constant)


def _json_depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inside = [list(item.values()) if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inside for item in items]
    return depth - 1


def _bracket_depth(text: str) -> int:
    """Deepest nesting of brackets outside escapes; a closing one also closes what was left open inside it, as in `[(]`."""
    opened: list[str] = []
    deepest, escaped = 0, False
    for character in text:
        if escaped or character == "\\":
            escaped = not escaped
        elif character in "([{":
            opened.append(character)
            deepest = max(deepest, len(opened))
            if deepest > MAX_DEPTH:
                break
        elif character in ")]}" and (opening := "([{"[")]}".index(character)]) in opened:
            while opened.pop() != opening:
                pass
    return deepest
