"""Random JSON schemas whose every value is short, so that a model of any quality comes to the end of one within a known number of tokens.

Strings, arrays, numbers and objects are all bounded; the widest value of a schema of `depth` 2 has a few hundred characters. The same
seed gives the same schema. This file does not know what is done with a schema.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

NAMES = ("name", "age", "tags", "id", "city", "größe", "is_new", "price", "notes", "kind", "date", "a b")
WORDS = ("red", "green", "blue", "low", "high", "yes", "no", "näher", 'a "quoted" one', "x\\y")
PATTERNS = ("^[a-z]{1,6}$", "^[A-Z][a-z]{2,5}$", "^[0-9]{4}-[0-9]{2}$", "^(on|off|auto)$", "^#[0-9a-f]{6}$")
FORMATS = ("date", "time", "ipv4", "uuid")
MOST_PROPERTIES = 4

Schema = dict[str, Any]


def random_schema(seed: int, *, depth: int = 2) -> Schema:
    """An object's schema with values nested at most `depth` deep."""
    draw = random.Random(seed)
    schema = _object(draw, depth)
    if draw.random() < 0.2:  # the same by way of a reference
        return {"$ref": "#/$defs/root", "$defs": {"root": schema}}
    return schema


def _value(draw: random.Random, depth: int) -> Schema:
    nested: tuple[Callable[[random.Random, int], Schema], ...] = (_object, _array, _either) if depth > 0 else ()
    kinds = (_string, _integer, _number, _enum, _constant, _flag, *nested)
    return draw.choice(kinds)(draw, depth - 1)


def _object(draw: random.Random, depth: int) -> Schema:
    names = draw.sample(NAMES, draw.randint(1, MOST_PROPERTIES))
    required = [name for name in names if draw.random() < 0.7]
    properties = {name: _value(draw, depth) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(draw: random.Random, depth: int) -> Schema:
    least = draw.randint(0, 2)
    return {"type": "array", "items": _value(draw, depth), "minItems": least, "maxItems": least + draw.randint(0, 1)}


def _either(draw: random.Random, depth: int) -> Schema:
    return {"anyOf": [_value(draw, depth), {"type": "null"}]}


def _string(draw: random.Random, depth: int) -> Schema:
    roll = draw.random()
    if roll < 0.3:
        return {"type": "string", "pattern": draw.choice(PATTERNS)}
    if roll < 0.5:
        return {"type": "string", "format": draw.choice(FORMATS)}
    least = draw.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 9)}


def _integer(draw: random.Random, depth: int) -> Schema:
    low = draw.randint(-50, 50)
    return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 2000)}


def _number(draw: random.Random, depth: int) -> Schema:
    return {"enum": [round(draw.uniform(-10, 10), draw.randint(0, 3)) for _ in range(draw.randint(1, 3))]}


def _enum(draw: random.Random, depth: int) -> Schema:
    return {"enum": draw.sample([*WORDS, 1, -2.5, None, True], draw.randint(1, 4))}


def _constant(draw: random.Random, depth: int) -> Schema:
    return {"const": draw.choice([*WORDS, 7, False, None])}


def _flag(draw: random.Random, depth: int) -> Schema:
    return {"type": "boolean"}
