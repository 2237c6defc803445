"""JSON answers fit their schema, tool calls fit a tool on offer."""

import json
import random
import re

import jsonschema

from checkpoints.structured import DOMAINS, json_extraction, schema_of, tool_answer, tool_call

TYPES = {"string": str, "integer": int}


def test_extraction_answers_fit_the_schema_in_the_prompt():
    rng, with_schema = random.Random(0), 0
    for _ in range(300):
        messages = json_extraction(rng).messages
        prompt, answer = " ".join(message["content"] for message in messages[:-1]), json.loads(messages[-1]["content"])
        found = re.search(r'\{"type": "object".*?"required": \[[^\]]*\]\}', prompt)
        if found:
            with_schema += 1
            schema = json.loads(found[0])
            jsonschema.validate(answer, schema | {"additionalProperties": False})
            assert list(answer) == schema["required"]
        for value in answer.values():
            if isinstance(value, str):
                assert value in prompt
    assert with_schema > 150


def test_schemas_are_valid():
    for fields in DOMAINS.values():
        jsonschema.Draft202012Validator.check_schema(schema_of(list(fields)))


def test_calls_fit_a_tool_on_offer():
    rng = random.Random(1)
    for _ in range(200):
        exchange = tool_call(rng)
        (call,) = exchange.messages[-1]["tool_calls"]
        (spec,) = [tool["function"] for tool in exchange.tools if tool["function"]["name"] == call["name"]]
        jsonschema.validate(call["arguments"], spec["parameters"])
        for value in call["arguments"].values():
            assert str(value) in exchange.messages[0]["content"]


def test_tool_answers_report_the_result():
    rng = random.Random(2)
    for _ in range(100):
        *_, call, result, answer = tool_answer(rng).messages
        assert [message["role"] for message in (call, result, answer)] == ["assistant", "tool", "assistant"]
        (value,) = json.loads(result["content"]).values()
        assert str(value) in answer["content"] or value in ("done", "ok")
