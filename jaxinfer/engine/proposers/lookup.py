"""Prompt lookup: what followed the longest end of a text the last time that it stood in the same text. Plain Python.

A suffix automaton (Blumer et al. 1985) over prompt and output grows by one token in amortised constant time; its state for the whole text
links to the state of the longest end that occurred before, so a look-up is constant too. States with one way out, nearly all, are kept in
flat arrays: about 30 bytes for each, 1.5 states for each token. This file does not know what a draft is worth.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

from jaxinfer.engine.proposers.proposal import Proposal
from jaxinfer.engine.sequence import Key
from jaxinfer.engine.sequence import Sequence as Running

NONE = -1
AT_ONCE = 512  # tokens of prompts that are read between two calls of `rest`: a long prompt must not hold up the others
KINDS = ((1, "lookup 1"), (2, "lookup 2"), (4, "lookup 3-4"), (8, "lookup 5-8"))  # a match of so many tokens at most


class Match(NamedTuple):
    """The longest end of a text that occurred before (0: none), and where its latest earlier occurrence is followed on."""

    length: int
    following: int


class Lookup:
    """One sequence's text. `text` may be read by anyone."""

    def __init__(self) -> None:
        self.text = array("i")
        self._link, self._length, self._end = array("i", (NONE,)), array("i", (0,)), array("i", (0,))
        self._token, self._target = array("i", (NONE,)), array("i", (NONE,))  # the first way out of each state
        self._more: dict[int, dict[int, int]] = {}  # the others
        self._last = 0

    def __len__(self) -> int:
        return len(self.text)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens at the end."""
        text, link, length, end, first, target, more = self.text, self._link, self._length, self._end, self._token, self._target, self._more
        last = self._last
        for token in tokens:
            if text:  # the text as it stands is the latest occurrence of its longest repeated end
                end[link[last]] = len(text)
            text.append(token)
            state, new = last, self._state(length[last] + 1, len(text))
            while state != NONE:
                known = first[state]
                if known == NONE:
                    first[state], target[state] = token, new
                elif known == token:
                    break
                elif state not in more:
                    more[state] = {token: new}
                elif token in more[state]:
                    break
                else:
                    more[state][token] = new
                state = link[state]
            if state == NONE:
                link[new] = 0
            else:
                found = target[state] if first[state] == token else more[state][token]
                link[new] = found if length[found] == length[state] + 1 else self._split(state, token, found)
            last = self._last = new

    @property
    def match(self) -> Match:
        """What the text's end was like before."""
        if not self.text:
            return Match(0, 0)
        state = self._link[self._last]
        return Match(self._length[state], self._end[state])

    def propose(self, count: int) -> Sequence[int]:
        """The `count` tokens that followed the match, over and over where it reaches the text's end; none without a match."""
        length, at = self.match
        if not length:
            return ()
        period = len(self.text) - at
        return [self.text[at + place % period] for place in range(count)]

    def _split(self, state: int, token: int, found: int) -> int:
        """A state of its own for the shorter ends among those of `found`, which occur in one more place now."""
        twin = self._state(self._length[state] + 1, self._end[found])
        self._link[twin], self._link[found] = self._link[found], twin
        self._token[twin], self._target[twin] = self._token[found], self._target[found]
        if found in self._more:
            self._more[twin] = dict(self._more[found])
        while state != NONE and self._next(state, token) == found:
            if self._token[state] == token:
                self._target[state] = twin
            else:
                self._more[state][token] = twin
            state = self._link[state]
        return twin

    def _state(self, length: int, end: int) -> int:
        self._link.append(NONE)
        self._length.append(length)
        self._end.append(end)
        self._token.append(NONE)
        self._target.append(NONE)
        return len(self._link) - 1

    def _next(self, state: int, token: int) -> int:
        if self._token[state] == token:
            return self._target[state]
        others = self._more.get(state)
        return NONE if others is None else others.get(token, NONE)


class LookupProposer:
    """Prompt lookup for every sequence, each in its own text."""

    DEVICE: ClassVar[bool] = False
    HOPED: ClassVar[float] = 0.5  # what it says is compared with what comes, drafted or not

    def __init__(self) -> None:
        self._texts: dict[Key, Lookup] = {}
        self._left = AT_ONCE

    def rest(self) -> bool:
        """A new step: so much may be read again. Whether all that could be was."""
        left, self._left = self._left, AT_ONCE
        return left <= 0

    def propose(self, sequence: Running, count: int) -> Proposal | None:
        """What followed the text's end before; None without a match, and while a long prompt is still being read."""
        text, tokens = self._texts.setdefault(sequence.request.key, Lookup()), sequence.tokens
        fresh = len(tokens) - len(text)
        if fresh > 0:
            reading = min(fresh, max(self._left, 8))
            text.extend(tokens[len(text) : len(text) + reading])
            self._left -= reading
        length = text.match.length
        if not length or len(text) < len(tokens):
            return None
        kind = next((name for most, name in KINDS if length <= most), "lookup 9-")
        return Proposal(tuple(text.propose(count)), kind)

    def forget(self, key: Key) -> None:
        """Drop a sequence's text."""
        self._texts.pop(key, None)
