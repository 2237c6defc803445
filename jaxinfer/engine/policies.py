"""In which order waiting sequences are admitted: one function per policy, found by its name.

A policy takes the waiting sequences (those preempted first, then in order of arrival) and yields them in the order to try; the scheduler
stops reading as soon as nothing more fits, so a policy that yields lazily costs nothing for a long queue.
A new policy is a new function here. This file does not know about pages, slots or devices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

from jaxinfer.config import ConfigError
from jaxinfer.request import Request


@runtime_checkable
class Waiting(Protocol):
    """What a policy may look at: the request, and every token that has to be computed for it."""

    request: Request
    tokens: list[int]


Line = TypeVar("Line", bound=Waiting)
Policy = Callable[[Iterable[Any]], Iterator[Any]]


def fcfs(waiting: Iterable[Line]) -> Iterator[Line]:
    """First come, first served."""
    return iter(waiting)


def priority(waiting: Iterable[Line]) -> Iterator[Line]:
    """Smaller `priority` first, equals in order of arrival."""
    return iter(sorted(waiting, key=lambda sequence: sequence.request.priority))


def shortest(waiting: Iterable[Line]) -> Iterator[Line]:
    """Fewest tokens to prefill first, equals in order of arrival."""
    return iter(sorted(waiting, key=lambda sequence: len(sequence.tokens)))


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
