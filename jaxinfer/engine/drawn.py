"""What a step drew, copied to the host: for each row that samples its tokens in order, with their log probabilities where asked for.

This file does not know what becomes of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxinfer.request import TokenLogprob
from jaxinfer.sampling import Sampled
from jaxinfer.step.inputs import Packed
from jaxinfer.step.verify import Verified


class Drawn(NamedTuple):
    """One token that a step drew for one row; below 0 why it could draw none."""

    token: int
    logprob: TokenLogprob | None


def fetch(packed: Packed, sampled: Sampled | Verified) -> dict[int, list[Drawn]]:
    """What was drawn by the row's index among the program's rows; a row with drafts has as many tokens as count."""
    rows = [(index, row.request.params.logprobs) for index, row in packed.rows if row.samples]
    verified = isinstance(sampled, Verified)
    found, counts = (sampled.drawn, np.asarray(sampled.counts).tolist()) if verified else (sampled, None)
    width = packed.shapes.bucket.decode_tokens if verified else 1
    tokens = np.asarray(found.told).tolist()
    scores = None
    if any(asked is not None for _, asked in rows):
        scores = [np.asarray(values) for values in (found.logprob, found.top_tokens, found.top_logprobs)]

    def logprob(at: int, asked: int | None) -> TokenLogprob | None:
        if scores is None or asked is None:
            return None
        top = tuple(zip(scores[1][at, :asked].tolist(), scores[2][at, :asked].tolist(), strict=True))
        return TokenLogprob(tokens[at], float(scores[0][at]), top)

    return {
        index: [
            Drawn(tokens[at], logprob(at, asked))
            for at in range(index * width, index * width + (1 if counts is None else counts[index]))
        ]
        for index, asked in rows
    }
