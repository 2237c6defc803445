"""How many tokens a request may produce, and requests that can never run. Plain Python."""

from __future__ import annotations

import numpy as np

from jaxinfer.request import Request, RequestError


def limit_of(request: Request, *, longest: int, vocab: int) -> int:
    """The most tokens that its sequence may produce in a context of `longest` tokens.

    Raises:
        RequestError: it can never run: several sequences in one, tokens outside the vocabulary, too long.
    """
    params = request.params
    if params.n != 1:
        raise RequestError("the engine takes one sequence at a time; split n with request.choices", "n")
    for name, largest in (
        ("prompt", int(np.max(request.ids))), ("logit_bias", max(params.logit_bias, default=0)),
        ("stop_token_ids", max(params.stop.token_ids, default=0)), ("allowed_token_ids", max(params.allowed_token_ids or (0,))),
    ):  # fmt: skip
        if largest >= vocab:
            raise RequestError(f"{name} holds token id {largest}, but the vocabulary ends at {vocab - 1}", name)
    length = len(request.prompt)
    if length >= longest:
        raise RequestError(f"the prompt has {length} tokens, but the context holds {longest}, output included; shorten it", "prompt")
    if params.max_tokens is not None and length + params.max_tokens > longest:
        raise RequestError(
            f"the prompt's {length} tokens and max_tokens {params.max_tokens} exceed the context of {longest} tokens;"
            f" ask for at most {longest - length}",
            "max_tokens",
        )
    limit = longest - length if params.max_tokens is None else params.max_tokens
    if params.min_tokens > limit:
        raise RequestError(f"min_tokens {params.min_tokens} exceeds the {limit} tokens that still fit; lower it", "min_tokens")
    return limit
