"""Tokens with their probabilities in the two forms that OpenAI's API has for them.

Chat: text, bytes and the most likely alternatives. Completions: parallel lists, the token itself always among the alternatives with the
identical number; a token that is no whole character is written `bytes:\\xe2\\x80`, so that no two tokens share a key.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

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


class CompletionWriter:
    """Writes one choice's tokens; remembers how many characters came before, for `text_offset`."""

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._offset = offset
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, entries: Sequence[TokenLogprob]) -> wire.CompletionLogprobs:
        """The next tokens of the choice."""
        lists = wire.CompletionLogprobs([], [], [], [])
        for entry in entries:
            lists.tokens.append(key(self._tokenizer, entry.token))
            lists.token_logprobs.append(finite(entry.logprob))
            lists.top_logprobs.append(self._top(entry))
            lists.text_offset.append(self._offset)
            self._offset += len(self._characters.decode(self._tokenizer.token_bytes(entry.token)))
        return lists

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        named = {token: logprob for token, logprob in entry.top}
        named[entry.token] = entry.logprob
        return {key(self._tokenizer, token): finite(logprob) for token, logprob in named.items()}
