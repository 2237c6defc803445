"""What a step drew, copied to the host: for each row that samples its tokens in order, with their log probabilities where asked for.

This file does not know what becomes of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from jaxinfer.request import TokenLogprob
from jaxinfer.sampling import Sampled
from jaxinfer.step.inputs import Packed
from jaxinfer.step.verify import Verified


@dataclass(frozen=True)
class Drawn:
    """One token that a step drew for one row."""

    token: int
    logprob: TokenLogprob | None
    finite: bool
    possible: bool


def fetch(packed: Packed, sampled: Sampled | Verified) -> dict[int, list[Drawn]]:
    """What was drawn by the row's index among the program's rows; a row with drafts has as many tokens as count."""
    rows = [(index, row) for index, row in packed.rows if row.samples]
    verified = isinstance(sampled, Verified)
    found, counts = (sampled.drawn, jax.device_get(sampled.counts)) if verified else (sampled, None)
    width = packed.shapes.bucket.decode_tokens if verified else 1
    tokens, finite, possible = jax.device_get((found.token, found.finite, found.possible))
    wanted = any(row.request.params.logprobs is not None for _, row in rows)
    scores = jax.device_get((found.logprob, found.top_tokens, found.top_logprobs)) if wanted else None

    def drawn(at: int, asked: int | None) -> Drawn:
        logprob = None
        if scores is not None and asked is not None:
            top = tuple(zip(scores[1][at, :asked].tolist(), scores[2][at, :asked].tolist(), strict=True))
            logprob = TokenLogprob(int(tokens[at]), float(scores[0][at]), top)
        return Drawn(int(tokens[at]), logprob, bool(finite[at]), bool(possible[at]))

    return {
        index: [drawn(index * width + place, row.request.params.logprobs) for place in range(1 if counts is None else int(counts[index]))]
        for index, row in rows
    }
