"""Greedy outputs of a model for the audit's prompts, and how fast it makes them.

Both go through the engine as any request does. What is generated once serves the agreement, the task's score and, from the reference
model, as the text to be scored where the user gave none. This file does not know schemes.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from statistics import median

from jaxinfer.api import LLM, Completion
from jaxinfer.audit.report import Speed
from jaxinfer.prompts import Document
from jaxinfer.request import FinishReason, Request, SamplingParams

TIMED = 16  # documents in a timed turn, at most


def greedy(llm: LLM, documents: Sequence[Document], max_tokens: int) -> list[Completion]:
    """What the model says to each prompt, its likeliest token at each step, up to its own end.

    Raises:
        RuntimeError: a sequence ended with an error.
    """
    found = list(llm.complete(_requests(documents, max_tokens, ignore_eos=False)))
    broken = next((number for number, made in enumerate(found) if made.finish_reason is FinishReason.ERROR), None)
    if broken is not None:
        raise RuntimeError(f"line {documents[broken].line}: {found[broken].error}")
    return found


def race(reference: LLM, other: LLM, documents: Sequence[Document], max_tokens: int, repeat: int) -> Speed | None:
    """Time both in turns, each on the same prompts and output lengths; the first turn warms up. None if nothing is to be timed."""
    if repeat < 1:
        return None
    timed, turns = documents[:TIMED], []
    for _ in range(repeat + 1):
        turns.append(tuple(_rate(llm, timed, max_tokens) for llm in (reference, other)))
    counted = turns[1:]
    ratios = tuple(theirs / ours for ours, theirs in counted)
    return Speed(median(ours for ours, _ in counted), median(theirs for _, theirs in counted), median(ratios), ratios)


def _rate(llm: LLM, documents: Sequence[Document], max_tokens: int) -> float:
    requests = _requests(documents, max_tokens, ignore_eos=True)
    begun = time.perf_counter()
    tokens = sum(len(made.token_ids) for made in llm.complete(requests))
    return tokens / (time.perf_counter() - begun)


def _requests(documents: Sequence[Document], max_tokens: int, *, ignore_eos: bool) -> list[Request]:
    """A salt of their own keeps a turn from finding what another left in the prefix cache."""
    salt, made = secrets.token_hex(8), []
    for number, document in enumerate(documents):
        params = SamplingParams.of(temperature=0.0, max_tokens=min(max_tokens, document.room), ignore_eos=ignore_eos)
        made.append(Request(f"audit-{number}", document.prompt, params, cache_salt=salt))
    return made
