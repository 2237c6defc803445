"""Tokens with their probabilities in the two forms that OpenAI's API has for them.

Chat: text, bytes and the most likely alternatives. Completions: parallel lists, the token itself always among the alternatives with the
identical number; a token that is no whole character is written `bytes:\\xe2\\x80`, so that no two tokens share a key. Prompts are
written either as the beginning of a completion's lists (`echo`) or by token ids, in vLLM's form (`prompt_logprobs`).
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from jaxinfer.request import TokenLogprob
from jaxinfer.serve import wire
from jaxinfer.tokenizer import Tokenizer


def finite(logprob: float) -> float:
    """JSON has no -Infinity; a token that was ruled out gets a number far below any other."""
    return max(logprob, wire.LOWEST_LOGPROB)


def chat(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> wire.ChatLogprobs:
    """The logprobs of some chat tokens."""
    return wire.ChatLogprobs([
        wire.ChatTokenLogprob(
            tokenizer.token_text(entry.token),
            finite(entry.logprob),
            list(tokenizer.token_bytes(entry.token)),
            [wire.TopLogprob(tokenizer.token_text(t), finite(p), list(tokenizer.token_bytes(t))) for t, p in entry.top],
        )
        for entry in entries
    ])  # fmt: skip


def key(tokenizer: Tokenizer, token: int) -> str:
    """A token's name in a completion's lists."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def prompt(tokenizer: Tokenizer, entries: Sequence[TokenLogprob | None], count: int) -> list[dict[str, wire.PromptLogprob] | None]:
    """A prompt's tokens by their ids, each with `count` alternatives; None for the first."""

    def named(entry: TokenLogprob) -> dict[str, wire.PromptLogprob]:
        own = (entry.token, entry.logprob, entry.rank or 1)
        others = [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top[:count], 1) if token != entry.token]
        return {str(token): wire.PromptLogprob(finite(p), rank, tokenizer.token_text(token)) for token, p, rank in (own, *others)}

    return [entry and named(entry) for entry in entries]


class CompletionWriter:
    """Writes one choice's tokens with `count` alternatives; remembers how many characters came before, for `text_offset`."""

    def __init__(self, tokenizer: Tokenizer, count: int, offset: int = 0, *, without_text: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._count = count
        self._offset = offset
        self._without_text = without_text
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, tokens: Sequence[int], entries: Sequence[TokenLogprob | None]) -> wire.CompletionLogprobs:
        """The next tokens of the choice, with what is known about each (nothing about the first token of a prompt)."""
        lists = wire.CompletionLogprobs([], [], [], [])
        for token, entry in zip(tokens, entries, strict=True):
            lists.tokens.append(key(self._tokenizer, token))
            lists.token_logprobs.append(entry and finite(entry.logprob))
            lists.top_logprobs.append(entry and self._top(entry))
            lists.text_offset.append(self._offset)
            if token not in self._without_text:
                self._offset += len(self._characters.decode(self._tokenizer.token_bytes(token)))
        return lists

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        named = {key(self._tokenizer, token): finite(logprob) for token, logprob in entry.top[: self._count]}
        return named | {key(self._tokenizer, entry.token): finite(entry.logprob)}
