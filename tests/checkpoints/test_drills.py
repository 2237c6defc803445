"""Drilled calls fit the tool they name, only one tool on offer fits the request, and graded instances stay out."""

import random

import jsonschema
import pytest

from checkpoints import conversations, skills
from checkpoints.drills import DRILLS


@pytest.mark.parametrize("name", DRILLS)
def test_drilled_calls_fit_one_tool_on_offer(name: str):
    rng = random.Random(name)
    for _ in range(100):
        exchange = DRILLS[name][0](rng)
        (call,) = exchange.messages[-1]["tool_calls"]
        (spec,) = [tool["function"] for tool in exchange.tools if tool["function"]["name"] == call["name"]]
        assert sum(tool["function"]["description"].lower() == spec["description"].lower() for tool in exchange.tools) == 1
        jsonschema.Draft202012Validator(spec["parameters"]).validate(call["arguments"])
        assert list(call["arguments"]) == spec["parameters"]["required"]
        assert all(str(value) in exchange.messages[0]["content"] for value in call["arguments"].values())
        assert "{" not in exchange.messages[0]["content"]


def test_training_draws_no_held_out_drill():
    rng = random.Random(0)
    assert not any(skills.is_held_out(conversations.train_exchange(rng, DRILLS)) for _ in range(300))


def test_a_share_of_the_conversations_drills():
    rng = random.Random(1)
    with_tools = [sum(bool(conversations.conversation(rng, share)[1]) for _ in range(200)) for share in (0.0, 0.9)]
    assert with_tools[0] < 80 < 160 < with_tools[1]
