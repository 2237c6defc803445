"""What a user may ask: every field checked when it is made, with the field's name in the error."""

from array import array
from dataclasses import FrozenInstanceError, replace

import pytest

from jaxinfer.grammar import Grammar
from jaxinfer.request import (
    MAX_ALLOWED_TOKENS,
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKENS,
    FinishReason,
    Output,
    Request,
    RequestError,
    SamplingParams,
    StopRules,
    choices,
)

NOT_NUMBERS = ("1", None, True, [1.0], float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), 1j)
NOT_INTEGERS = ("1", 1.0, True, [1], 10**5000, -(10**5000))

REFUSED = [
    *[(name, value) for name in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty") for value in NOT_NUMBERS],
    *[(name, value) for name in ("top_k", "seed", "logprobs", "max_tokens", "min_tokens", "n") for value in NOT_INTEGERS],
    *[("prompt_logprobs", value) for value in NOT_INTEGERS],
    ("temperature", -0.1), ("temperature", 100.1), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -2), ("top_k", 2**31), ("min_p", -0.1),
    ("min_p", 1.1), ("seed", 2**63), ("seed", -(2**63) - 1), ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0), ("logprobs", -1), ("logprobs", 21), ("max_tokens", 0), ("min_tokens", -1), ("n", 0),
    ("n", MAX_CHOICES + 1),
    ("logit_bias", {-1: 0.0}), ("logit_bias", {"1": 0.0}), ("logit_bias", {1: 101.0}), ("logit_bias", {1: "x"}), ("logit_bias", [1]),
    ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)), ("logit_bias", None),
    ("stop", ""), ("stop", ["x", ""]), ("stop", ["x"] * 17), ("stop", "x" * 257), ("stop", ["a", 5]), ("stop", 5), ("stop", {"a": 1}),
    ("stop_token_ids", [-1]), ("stop_token_ids", ["1"]), ("stop_token_ids", list(range(MAX_STOP_TOKENS + 1))), ("stop_token_ids", 5),
    ("stop_token_ids", "ab"), ("ignore_eos", "no"), ("include_stop_str_in_output", 1), ("skip_special_tokens", 0), ("tempratur", 1.0),
    ("bad_words", "word"), ("bad_words", [""]), ("bad_words", [" "]), ("bad_words", [3]), ("bad_words", ["a" * 65]), ("bad_words", None),
    ("bad_words", [str(i) for i in range(MAX_BAD_WORDS + 1)]), ("allowed_token_ids", []), ("allowed_token_ids", [-1]),
    ("allowed_token_ids", [True]), ("allowed_token_ids", "12"), ("allowed_token_ids", list(range(MAX_ALLOWED_TOKENS + 1))),
    ("prompt_logprobs", -1), ("prompt_logprobs", 21),
]  # fmt: skip


def clean(value):
    return hex(value)[:24] if isinstance(value, int) else repr(value)[:24]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=clean)
def test_bad_values_are_refused_by_name(name, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams.of(**{name: value})
    assert caught.value.param == name
    assert name in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0}, {"temperature": 100}, {"top_p": 1e-9}, {"top_p": 1}, {"top_k": -1}, {"top_k": 2**31 - 1}, {"min_p": 0},
        {"seed": -(2**63)}, {"seed": 2**63 - 1}, {"presence_penalty": -2}, {"repetition_penalty": 100}, {"logit_bias": {0: -100}},
        {"logprobs": 0}, {"logprobs": 20}, {"max_tokens": 1}, {"min_tokens": 5, "max_tokens": 5}, {"min_tokens": 7}, {"n": MAX_CHOICES},
        {"stop": None}, {"stop": "x" * 256}, {"stop": ["a", "b", "c", "d"]}, {"stop_token_ids": list(range(MAX_STOP_TOKENS))},
        {"ignore_eos": None, "stop_token_ids": None, "include_stop_str_in_output": None}, {"ignore_eos": True},
    ],
    ids=clean,
)  # fmt: skip
def test_the_edges_of_what_is_allowed(values):
    params = SamplingParams.of(**values)
    for name in set(values) & set(SamplingParams.__dataclass_fields__) - {"stop"}:
        assert getattr(params, name) == values[name]


def test_lists_lose_what_is_there_twice():
    params = SamplingParams(bad_words=["a", "b", "a"], allowed_token_ids=[3, 1, 3])
    assert (params.bad_words, params.allowed_token_ids) == (("a", "b"), (3, 1))


def test_min_tokens_may_not_exceed_max_tokens():
    with pytest.raises(RequestError, match="min_tokens must be between 0 and 4, got 5"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_flat_names_reach_the_stop_rules():
    params = SamplingParams.of(stop="END", stop_token_ids=[3, 4], ignore_eos=True, include_stop_str_in_output=True)
    assert params.stop == StopRules(("END",), (3, 4), True, True)
    assert SamplingParams.of(stop=StopRules(("a",), (1,)), stop_token_ids=[2]).stop == StopRules(("a",), (2,))
    assert SamplingParams(stop="a").stop == SamplingParams(stop=["a"]).stop == StopRules(("a",))


def test_defaults_are_openais():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.n, params.max_tokens, params.seed) == (1.0, 1.0, 1, None, None)
    assert not params.greedy
    assert SamplingParams(temperature=0).greedy


def test_a_request_cannot_change_after_it_was_checked():
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = "nonsense"
    assert params.logit_bias == {1: 2.0}
    with pytest.raises(FrozenInstanceError):
        params.temperature = -1.0


@pytest.mark.parametrize("prompt", [(), (-1,), (1, True), (1, 2**31), (1, 2.0)], ids=clean)
def test_prompts_are_checked(prompt):
    with pytest.raises(RequestError) as caught:
        Request("r", prompt)
    assert caught.value.param == "prompt"


def test_a_prompt_is_packed_once_and_no_part_of_what_a_request_is():
    request = Request("r", (3, 2**31 - 1))
    assert request.ids == array("i", request.prompt) and request.ids.itemsize == 4
    assert request == Request("r", (3, 2**31 - 1)) and "ids=array" not in repr(request)
    assert replace(request, prompt=(4,)).ids == array("i", [4])


@pytest.mark.parametrize(
    ("name", "value"), [("cache_salt", "x" * 257), ("cache_salt", None), ("cache_salt", b"x"), ("priority", 2**31), ("priority", True)]
)
def test_salt_and_priority_are_checked(name, value):
    with pytest.raises(RequestError, match=name):
        Request("r", (1,), **{name: value})


def test_choices_share_salt_and_priority():
    made = choices(Request("r", (1,), SamplingParams(n=2), priority=-3, cache_salt="s"))
    assert [(request.priority, request.cache_salt) for request in made] == [(-3, "s")] * 2


def test_choices_share_the_prompt_and_differ_in_index_and_seed():
    request = Request("r", (1, 2), SamplingParams(n=4, seed=-7, max_tokens=3))
    split = choices(request)
    assert [part.key for part in split] == [("r", 0), ("r", 1), ("r", 2), ("r", 3)]
    assert {part.prompt for part in split} == {(1, 2)}
    assert {part.params.n for part in split} == {1}
    seeds = [part.params.seed for part in split]
    assert seeds[0] == -7
    assert len(set(seeds)) == 4
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert choices(request) == split


def test_choices_without_a_seed_stay_without_one():
    assert {part.params.seed for part in choices(Request("r", (1,), SamplingParams(n=3)))} == {None}


def test_one_choice_is_the_request_itself():
    request = Request("r", (1,), SamplingParams(seed=5))
    assert choices(request) == [replace(request, index=0)]


def test_outputs_are_plain_values():
    assert FinishReason.STOP == "stop"
    assert Output("r").finish_reason is None
    assert f"{FinishReason.LENGTH}" == "length"


def test_a_grammar_decides_where_the_output_ends():
    grammar = Grammar.regex("a")
    assert SamplingParams.of(grammar=grammar).grammar is grammar
    for values, param in (({"min_tokens": 1}, "min_tokens"), ({"ignore_eos": True}, "ignore_eos")):
        with pytest.raises(RequestError, match="grammar") as caught:
            SamplingParams.of(grammar=grammar, **values)
        assert caught.value.param == param
    with pytest.raises(RequestError, match=r"Grammar\.json_schema"):
        SamplingParams.of(grammar={"type": "object"})
