"""Requests that can never run, and how long the others may get."""

import pytest

from jaxinfer.engine.longest import limit_of
from jaxinfer.request import Request, RequestError, SamplingParams


def limit(prompt, **params):
    return limit_of(Request("r", prompt, SamplingParams.of(**params)), longest=16, vocab=100)


def test_how_many_tokens_may_come():
    assert limit((1, 2, 3), max_tokens=5) == 5 and limit((1, 2, 3), max_tokens=None) == 13 and limit((99,), max_tokens=15) == 15


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((1,), {"n": 2}, "one sequence at a time"),
        ((1, 100), {}, "prompt holds token id 100, but the vocabulary ends at 99"),
        ((1,), {"logit_bias": {100: 1.0}}, "logit_bias holds token id 100"),
        ((1,), {"stop_token_ids": [100]}, "stop_token_ids holds token id 100"),
        ((1,), {"allowed_token_ids": [100]}, "allowed_token_ids holds token id 100"),
        (tuple(range(16)), {}, "the prompt has 16 tokens, but the context holds 16"),
        ((1, 2), {"max_tokens": 15}, "exceed the context of 16 tokens; ask for at most 14"),
        ((1, 2), {"max_tokens": None, "min_tokens": 15}, "min_tokens 15 exceeds the 14 tokens that still fit"),
    ],
)
def test_what_can_never_run(prompt, params, message):
    with pytest.raises(RequestError, match=message):
        limit(prompt, **params)
