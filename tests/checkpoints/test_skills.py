"""Generated skills: the answers are right, the split holds, the wording is clean."""

import random
import re

import pytest

from checkpoints import conversations, skills
from checkpoints.skills import PLAIN_SKILLS, is_held_out


def drawn(name: str, number: int = 200) -> list[tuple[str, str]]:
    rng = random.Random(name)
    exchanges = [PLAIN_SKILLS[name][0](rng) for _ in range(number)]
    return [(exchange.messages[0]["content"], exchange.messages[1]["content"]) for exchange in exchanges]


@pytest.mark.parametrize("name", PLAIN_SKILLS)
def test_answers_are_clean_and_repeatable(name: str):
    assert drawn(name, 50) == drawn(name, 50)
    for question, answer in drawn(name):
        assert question.strip() == question and answer.strip() == answer != ""
        assert "{" not in question + answer


@pytest.mark.parametrize(("name", "combine"), [("addition", "+"), ("subtraction", "-"), ("multiplication", "*")])
def test_arithmetic_is_right(name: str, combine: str):
    checked = 0
    for question, answer in drawn(name):
        a, b = (int(number) for number in re.findall(r"\d+", question))
        if question.startswith("Subtract"):
            a, b = b, a
        assert int(answer) == {"+": a + b, "-": a - b, "*": a * b}[combine], question
        checked += 1
    assert checked == 200


def test_sorting_and_reversing_are_right():
    for question, answer in drawn("sort_numbers"):
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        falling = "descending" in question or "largest to smallest" in question
        assert [int(number) for number in answer.split(", ")] == sorted(numbers, reverse=falling)
    for question, answer in drawn("reverse_words"):
        assert question.endswith(" ".join(reversed(answer.split(" ")))) or question.endswith(", ".join(reversed(answer.split(", "))))
    for question, answer in drawn("copying"):
        assert answer in question


def test_yes_no_is_balanced():
    answers = [answer for _, answer in drawn("yes_no", 1000)]
    assert set(answers) == {"Yes.", "No."} and 0.35 < answers.count("Yes.") / 1000 < 0.65


def test_training_never_sees_a_held_out_instance():
    rng = random.Random(0)
    assert not any(is_held_out(conversations.train_exchange(rng, conversations.SKILLS)) for _ in range(500))
    for name in ("addition", "reverse_words", "json_extraction", "tool_call"):
        found = conversations.held_out_exchanges(name, 20)
        assert len(found) == 20 and all(map(is_held_out, found))
    assert not any(is_held_out(skills.ask(question, "", "identity")) for question in ("Who are you?", "Hello!"))
    assert not is_held_out(skills.ask("What is the capital of France?", "", "fact"))
