"""One sequence's text as it grows: detokenise, find stop strings, hold back what may still turn into one.

Tokens come in one by one; `push` and `flush` hand out text that can no longer change, so the pieces joined are the text of the whole
answer, with everything from the stop string on cut off (unless it is wanted). This file does not know where tokens come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxinfer.request import StopRules
from jaxinfer.tokenizer import Detokenizer


class Piece(NamedTuple):
    """New final text, and the stop string that ended the sequence, if one did."""

    text: str
    stopped_by: str | None = None


class OutputText:
    """Text of one sequence. Invariant: `_held` is a suffix of the text so far that begins some stop string, or empty."""

    def __init__(self, detokenizer: Detokenizer | None, stop: StopRules) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._held = ""

    def push(self, token: int, *, may_stop: bool) -> Piece:
        """Add a token. Stop strings count only when `may_stop`; until then their text simply passes."""
        text = self._held + (self._detokenizer.push(token) if self._detokenizer else "")
        return self._release(text, may_stop)

    def flush(self) -> Piece:
        """Hand out what is held back because the sequence ended; held bytes may complete a stop string."""
        piece = self._release(self._held + (self._detokenizer.flush() if self._detokenizer else ""), True)
        text, self._held = piece.text + ("" if piece.stopped_by else self._held), ""
        return Piece(text, piece.stopped_by)

    def _release(self, text: str, may_stop: bool) -> Piece:
        if not self._stop.strings:
            return Piece(text)
        found = _first(text, self._stop.strings) if may_stop else None
        if found is not None:
            at, stop = found
            self._held = ""
            return Piece(text[: at + len(stop)] if self._stop.include_in_output else text[:at], stop)
        keep = _overlap(text, self._stop.strings)
        self._held = text[len(text) - keep :]
        return Piece(text[: len(text) - keep])


def _first(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the earliest stop string begins, and which it is (the longest among those that begin there)."""
    hits = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
    return (min(hits)[0], min(hits)[2]) if hits else None


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that some stop string begins with."""
    longest = min(len(text), max((len(stop) - 1 for stop in stops), default=0))
    return next((size for size in range(longest, 0, -1) if any(stop.startswith(text[-size:]) for stop in stops)), 0)
