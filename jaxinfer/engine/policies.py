"""In which order waiting sequences are admitted: one function per policy, found by its name.

A policy is a key: of two waiting sequences the one with the smaller key is admitted first. Equal keys go by arrival, those that were
preempted first. The line (`line.py`) asks for a key when a sequence joins it and again from time to time, never for the whole line at
once. A sequence that was preempted stands at the head of its class; a policy that would send it back says so itself.
A new policy is a new function here. This file does not know about pages, slots or devices.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxinfer.config import ConfigError
from jaxinfer.request import Request

HEAD = float("-inf")


@runtime_checkable
class Waiting(Protocol):
    """What a policy may look at: the request, every token that has to be computed for it, and how often it was preempted."""

    request: Request
    tokens: array[int]
    preemptions: int

    @property
    def cached(self) -> int:
        """How many of its tokens are in the prefix cache now; looked up when it is read."""
        ...


Policy = Callable[[Waiting], float]


def fcfs(waiting: Waiting) -> float:
    """First come, first served."""
    return 0


def priority(waiting: Waiting) -> float:
    """Smaller `priority` first, equals in order of arrival."""
    return waiting.request.priority


def shortest(waiting: Waiting) -> float:
    """Shortest prompt first, equals in order of arrival."""
    return HEAD if waiting.preemptions else len(waiting.tokens)


def longest_prefix(waiting: Waiting) -> float:
    """Most tokens in the prefix cache first, equals in order of arrival."""
    return HEAD if waiting.preemptions else -waiting.cached


def names() -> list[str]:
    """All policies of this file."""
    return sorted(name for name, value in vars(sys.modules[__name__]).items() if _is_policy(name, value))


def find(name: str) -> Policy:
    """The policy of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in names():
        raise ConfigError(f"--policy {name!r} is unknown; choose one of {', '.join(names())}")
    return vars(sys.modules[__name__])[name]


def _is_policy(name: str, value: object) -> bool:
    return (
        callable(value)
        and getattr(value, "__module__", "") == __name__
        and name not in ("names", "find")
        and not (isinstance(value, type) or name.startswith("_"))
    )
