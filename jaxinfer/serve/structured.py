"""What clients ask about the shape of an answer: OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_*`.

All of them become one `Grammar`, or none; what is wrong with it is told under the name of the field that it came from. Compiling may take
seconds, so `prepare` belongs on a thread of its own. This file does not know how a grammar binds the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from jaxinfer.engine.grammar import Grammars
from jaxinfer.errors import RequestError
from jaxinfer.grammar import Grammar
from jaxinfer.serve.errors import refused
from jaxinfer.serve.schema import ResponseFormat, Sampling, StructuredOutputs


class Asked(NamedTuple):
    """A grammar and the field that asked for it."""

    field: str
    grammar: Grammar


class _Wish(NamedTuple):
    """What a field asks for, before it is checked."""

    field: str
    make: Callable[[], Grammar]


def asked(body: Sampling) -> Asked | None:
    """The one grammar of a body.

    Raises:
        ApiError: 400, it is malformed or too large, or there are several.
    """
    wishes = list(_wishes(body))
    if not wishes:
        return None
    if len(wishes) > 1:
        message = f"{wishes[0].field} and {wishes[1].field} exclude each other: an answer keeps to one grammar; leave one out"
        raise refused(wishes[1].field, message)
    try:
        return Asked(wishes[0].field, wishes[0].make())
    except RequestError as error:
        raise refused(wishes[0].field, f"{wishes[0].field}: {error}") from None


def prepare(body: Sampling, grammars: Grammars) -> None:
    """Compile a body's grammar, so that the engine finds it ready (slow).

    Raises:
        ApiError: 400, it cannot be used; the message says why.
    """
    found = asked(body)
    if found is None:
        return
    try:
        grammars.compile(found.grammar)
    except RequestError as error:
        raise refused(found.field, f"{found.field}: {error}", "invalid_grammar") from None


def _wishes(body: Sampling) -> Iterator[_Wish]:
    if body.response_format is not None:
        yield from _of_format(body.response_format)
    if body.structured_outputs is not None:
        yield from _of_outputs(body.structured_outputs)
    yield from _made("guided_json", Grammar.json_schema, body.guided_json)
    yield from _made("guided_regex", Grammar.regex, body.guided_regex)
    yield from _made("guided_choice", Grammar.choice, body.guided_choice)
    yield from _made("guided_grammar", Grammar.lark, body.guided_grammar)


def _of_format(form: ResponseFormat) -> Iterator[_Wish]:
    if form.type == "json_object":
        yield _Wish("response_format", Grammar.json_object)
    elif form.type == "json_schema":
        if form.json_schema is None or form.json_schema.content is None:
            raise refused("response_format", 'response_format of type json_schema needs json_schema: {"name": ..., "schema": {...}}')
        yield from _made("response_format", Grammar.json_schema, form.json_schema.content)


def _of_outputs(outputs: StructuredOutputs) -> Iterator[_Wish]:
    name = "structured_outputs"
    yield from _made(name, Grammar.json_schema, outputs.json_schema)
    yield from _made(name, Grammar.regex, outputs.regex)
    yield from _made(name, Grammar.choice, outputs.choice)
    yield from _made(name, Grammar.lark, outputs.grammar)
    if outputs.json_object:
        yield _Wish(name, Grammar.json_object)


def _made(field: str, maker: Callable[[Any], Grammar], value: Any) -> Iterator[_Wish]:
    if value is not None:
        yield _Wish(field, partial(maker, value))
