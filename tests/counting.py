"""How much work something is, without a clock: a busy machine does not change it."""

from __future__ import annotations

import sys
from collections.abc import Callable


def work(act: Callable[[], object]) -> int:
    """How many function calls something takes."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(None)
    return calls
