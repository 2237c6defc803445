"""Grammars while sequences run: compiled once, kept for the next request, one matcher for each sequence.

`Grammars.compile` is called by the doors before a request is queued, on a thread that may wait: a new grammar is tried in another process
first (`grammar_trial.py`). `Grammars.matcher` starts a sequence; from then on `Matcher.accept` follows the tokens that are known on
the host and `Matcher.fill` says which may come next, so preemption and recomputation leave it alone. This file does not know about
batches or requests.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt32
from llguidance import LLMatcher, LLTokenizer

from jaxinfer.engine.grammar_compile import GrammarProblem, compiled, tokenizer_of
from jaxinfer.engine.grammar_trial import SECONDS, Trial
from jaxinfer.errors import RequestError
from jaxinfer.grammar import Grammar
from jaxinfer.sampling import ALL_ALLOWED, mask_words
from jaxinfer.tokenizer import Tokenizer

KEPT = 128


class Grammars:
    """The compiled grammars of one model, at most `kept` of them; any thread may call it.

    vocab: the model's; ids at and above the tokenizer's own are never allowed. seconds: the time a grammar may take to compile.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab: int, *, seconds: float = SECONDS, kept: int = KEPT) -> None:
        self._source = tokenizer
        self._vocab = vocab
        self._seconds = seconds
        self._kept = kept
        self._found: OrderedDict[Grammar, LLMatcher | str] = OrderedDict()
        self._reading = threading.Lock()
        self._compiling = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._trial: Trial | None = None

    def compile(self, grammar: Grammar) -> None:
        """Make a grammar ready (up to a few seconds the first time).

        Raises:
            RequestError: it cannot be used; the message says why.
        """
        self._get(grammar)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher before a sequence's first token; fast if the grammar was compiled lately.

        Raises:
            RequestError: it cannot be used.
        """
        return Matcher(self._get(grammar).deep_copy(), self._vocab)

    def close(self) -> None:
        """End the process that tries grammars."""
        with self._compiling:
            if self._trial is not None:
                self._trial.close()

    def _get(self, grammar: Grammar) -> LLMatcher:
        found = self._look_up(grammar)
        if found is None:
            with self._compiling:
                found = self._look_up(grammar) or self._keep(grammar, self._compiled(grammar))
        if isinstance(found, str):
            raise RequestError(f"the {grammar.kind} cannot be used: {found}", "grammar")
        return found

    def _look_up(self, grammar: Grammar) -> LLMatcher | str | None:
        with self._reading:
            if grammar in self._found:
                self._found.move_to_end(grammar)
            return self._found.get(grammar)

    def _keep(self, grammar: Grammar, result: LLMatcher | str) -> LLMatcher | str:
        with self._reading:
            self._found[grammar] = result
            while len(self._found) > self._kept:
                self._found.popitem(last=False)
        return result

    def _compiled(self, grammar: Grammar) -> LLMatcher | str:
        """The matcher, or why there is none."""
        try:
            trial, tokenizer = self._start()
            return trial.problem(grammar) or compiled(grammar, tokenizer)
        except GrammarProblem as error:
            return str(error)

    def _start(self) -> tuple[Trial, LLTokenizer]:
        if self._tokenizer is None or self._trial is None:
            if self._source is None or not self._source.eos_ids:
                raise GrammarProblem("this model has no tokenizer with an end-of-sequence token, which a grammar needs")
            size = max(self._vocab, self._source.vocab_size)
            setup = {"text": self._source.to_json(), "eos": self._source.eos_ids, "vocab": size}
            self._tokenizer = tokenizer_of(**setup)
            self._trial = Trial(setup, seconds=self._seconds)
        return self._trial, self._tokenizer


class Matcher:
    """Where one sequence stands in its grammar.

    Once something is wrong (a token that was not allowed, a grammar that needs too much work) everything is allowed by `fill`, and the
    next `accept` raises.
    """

    def __init__(self, core: LLMatcher, vocab: int) -> None:
        self._core = core
        self._vocab = vocab

    def accept(self, token: int) -> None:
        """Follow one token; an end-of-sequence token only where the text may end.

        Raises:
            GrammarProblem: the grammar does not allow it, or is too complex from here on.
        """
        if not self._core.consume_token(token) or self._core.is_error():
            raise GrammarProblem("the output left its grammar, or the grammar needs too much work from here on")

    @property
    def finished(self) -> bool:
        """Whether nothing but an end-of-sequence token may follow."""
        return self._core.is_stopped()

    def fill(self, row: UInt32[np.ndarray, " words"]) -> None:
        """Write which tokens may come next: bit t % 32 of word t // 32 for token t. All bits once something is wrong."""
        allowed = np.frombuffer(self._core.compute_bitmask(), "<u4")
        if self._core.is_error():
            row[:] = ALL_ALLOWED
            return
        row[:] = allowed[: len(row)]
        if self._vocab % 32:
            row[-1] &= np.uint32((1 << self._vocab % 32) - 1)

    def fill_along(self, rows: UInt32[np.ndarray, "places words"], drafts: Sequence[int]) -> None:
        """Write which tokens may come next, then which after the first draft, and so on as far as the grammar allows the drafts: behind one
        that it does not allow nothing is drawn. The matcher stays where it is."""
        taken = 0
        for row, draft in zip(rows, (*drafts, None), strict=False):
            self.fill(row)
            if draft is None or self._core.is_error() or self._core.is_stopped() or self._core.try_consume_tokens([draft]) != 1:
                break
            taken += 1
        if taken:
            self._core.rollback(taken)


def masks(
    matchers: Mapping[int, tuple[Matcher, Sequence[int]]], shape: tuple[int, int], vocab: int
) -> UInt32[np.ndarray, "rows words"] | None:
    """A fresh mask for a step's sampler (see `sampling.masked`): rows without a matcher allow everything. None if there is no matcher.

    matchers: with the drafts of the row. shape: rows and places of each; a row's places follow each other.
    """
    if not matchers:
        return None
    mask = np.full((*shape, mask_words(vocab)), ALL_ALLOWED)
    for index, (matcher, drafts) in matchers.items():
        matcher.fill_along(mask[index], drafts)
    return mask.reshape(-1, mask.shape[-1])
