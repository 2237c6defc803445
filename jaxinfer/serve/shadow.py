"""Drafts checked in service: a share of finished greedy requests is run again without drafts while there is nothing else to do.

A watched request's tokens are noted as they come. Once it has ended as it should it waits, one of few, until the engine is idle; then it
runs again with nobody's cached pages, leaving none, and the tokens are compared: checks and mismatches are counted in the engine's
metrics, the replay's own tokens are not. A replay gives way to whatever arrives and begins anew later, a few times at most. Prompts and
tokens are kept for that, a few at a time, and reach no log. The engine's thread alone calls this. This file does not know how requests
come or where outputs go.
"""

from __future__ import annotations

import logging
import random
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxinfer.request import FinishReason, Output, Request, RequestError

logger = logging.getLogger(__name__)

WATCHED = 32  # requests whose tokens are noted at once
WAITING = 4  # finished ones that wait; more are not checked
LONGEST = 8192  # tokens of one, prompt and output
ATTEMPTS = 3  # replays begun of one; when the last has to give way it is not checked

Key = tuple[str, int]


@dataclass
class _Noted:
    """A request, the tokens that it gave with drafts, and how many replays of it were begun."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    attempts: int = 0


@dataclass
class Shadow:
    """Checks a share (0 to 1) of the greedy requests that have no grammar."""

    share: float
    _draw: random.Random = field(default_factory=random.Random)
    _watched: dict[Key, _Noted] = field(default_factory=dict)
    _waiting: deque[_Noted] = field(default_factory=lambda: deque(maxlen=WAITING))
    _replay: _Noted | None = None
    _found: list[int] = field(default_factory=list)
    _speculator: Any = None
    _prefix: str = field(default_factory=lambda: f"shadow-{secrets.token_hex(8)}-")
    _warned: bool = False

    def watch(self, request: Request) -> None:
        """A request was taken by the engine; perhaps it is one of the share."""
        fits = request.params.greedy and request.params.grammar is None and len(self._watched) < WATCHED
        if fits and len(request.prompt) < LONGEST and self._draw.random() < self.share:
            self._watched[request.key] = _Noted(request)

    def take(self, engine: Any, outputs: Sequence[Output]) -> list[Output]:
        """Note what a step produced; returns what is for others."""
        others = []
        for output in outputs:
            if output.request_id.startswith(self._prefix):
                self._follow(engine, output)
            else:
                others.append(output)
                if self._watched:
                    self._note(output)
        return others

    def begin(self, engine: Any) -> bool:
        """The engine is idle: replay one that waits, if there is one."""
        if self._replay is not None or not self._waiting or engine.speculator is None:
            return False
        noted = self._waiting.popleft()
        request, name = noted.request, self._prefix + secrets.token_hex(4)
        params = replace(request.params, logprobs=None, prompt_logprobs=None)
        again = Request(name, request.prompt, params, priority=request.priority)
        self._replay, self._found = _Noted(again, noted.tokens, noted.attempts + 1), []
        self._speculator, engine.speculator = engine.speculator, None
        try:
            engine.add(again, counted=False)
        except RequestError:  # it was taken once, so this is not foreseen; the server goes on
            logger.exception("a request could not be run again without drafts")
            self._end(engine)
        return self._replay is not None

    def give_way(self, engine: Any) -> None:
        """Something has arrived: end the replay, if there is one; another begins some other time unless this was the last."""
        if self._replay is not None:
            noted = self._replay
            if noted.attempts < ATTEMPTS:
                self._waiting.appendleft(noted)
            self._end(engine)
            engine.abort(noted.request.id)

    def _note(self, output: Output) -> None:
        key = (output.request_id, output.index)
        watched = self._watched.get(key)
        if watched is None:
            return
        watched.tokens.extend(output.token_ids)
        if output.finish_reason is None and len(watched.request.prompt) + len(watched.tokens) <= LONGEST:
            return
        del self._watched[key]
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) and len(self._waiting) < WAITING:
            self._waiting.append(watched)

    def _follow(self, engine: Any, output: Output) -> None:
        if self._replay is None or output.request_id != self._replay.request.id:
            return
        self._found.extend(output.token_ids)
        if output.finish_reason is None:
            return
        expected, found = self._replay.tokens, self._found
        self._end(engine)
        engine.metrics.shadow["checks"] += 1
        if output.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH) or found != expected:
            engine.metrics.shadow["mismatches"] += 1
            self._warn(engine)

    def _end(self, engine: Any) -> None:
        engine.speculator, self._speculator = self._speculator, None
        self._replay = None

    def _warn(self, engine: Any) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "a request that ran with drafts gave other tokens without them; in %s near ties may fall differently, in float32 they must"
                " not: jaxinfer_shadow_mismatches_total counts them, `jaxinfer selftest R5` looks into it, --speculate off does without",
                engine.info.dtype,
            )
