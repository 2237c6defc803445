"""The log probabilities of a prompt's tokens, put together from the chunks that it was computed in: host arrays, one prompt each.

A preempted sequence computes its prompt again, which gives the same entries. This file does not know how scores are computed.
"""

from __future__ import annotations

import numpy as np

from jaxinfer.batch import Row
from jaxinfer.request import Request, TokenLogprob
from jaxinfer.step.score import Scored


class PromptScores:
    """One prompt's entries as they become known; the first token has none."""

    def __init__(self, request: Request) -> None:
        self._prompt = request.prompt
        self._count = request.params.prompt_logprobs or 0
        self._entries: list[TokenLogprob | None] = [None] * len(request.prompt)

    def take(self, row: Row, scored: Scored, at: int) -> None:
        """Add what a chunk says about the tokens after each of its own. scored: on the host; at: where the chunk's tokens begin in it."""
        for place in range(row.start + 1, min(row.kv_length, len(self._prompt) - 1) + 1):
            index = at + place - row.start - 1
            tokens, logprobs = (np.asarray(values)[index, : self._count].tolist() for values in (scored.top_tokens, scored.top_logprobs))
            top, logprob = tuple(zip(tokens, logprobs, strict=True)), float(scored.logprob[index])
            self._entries[place] = TokenLogprob(self._prompt[place], logprob, top, int(scored.rank[index]))

    def entries(self) -> tuple[TokenLogprob | None, ...]:
        """All of them.

        Raises:
            RuntimeError: a token was never scored: part of the prompt was not computed.
        """
        if None in self._entries[1:]:
            raise RuntimeError("the prompt was not scored as a whole")
        return tuple(self._entries)
