"""Words that an output may not hold, as sequences of token ids: plain Python, once for each request.

A word is written one way inside a text and another after a blank, so each gives up to two sequences. A word that the model could spell
with other tokens than its tokenizer would is not found; neither does vLLM find it. This file does not know how sequences are excluded.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxinfer.request import RequestError
from jaxinfer.step.slots import BANNED_LENGTH
from jaxinfer.tokenizer import Tokenizer


def sequences(tokenizer: Tokenizer | None, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The token sequences of words, with and without a blank before them; one that ends in another of the same word is covered by it.

    Raises:
        RequestError: a word of too many tokens, or there is no tokenizer.
    """
    if not words:
        return ()
    if tokenizer is None:
        raise RequestError("bad_words needs a tokenizer, which this model does not have; use logit_bias", "bad_words")
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        inside, after_blank = (tuple(tokenizer.encode(blank + word.lstrip(), special=False)) for blank in ("", " "))
        if inside:  # characters that the vocabulary does not have cannot be written anyway
            found[inside] = None
        if inside and after_blank[-len(inside) :] != inside:
            found[after_blank] = None
    for sequence in found:
        if len(sequence) > BANNED_LENGTH:
            message = f"bad_words holds a word of {len(sequence)} tokens; at most {BANNED_LENGTH} are supported; give a shorter part of it"
            raise RequestError(message, "bad_words")
    return tuple(found)
