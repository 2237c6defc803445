"""A weight whose inputs are looked at on their way into the matmul: how calibration sees activations without a model file knowing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Observed:
    """A weight, and what is called with the inputs (tracers, inside a trace) of every product with it. `matmul` unwraps it."""

    weight: Any
    note: Callable[[Any], None]
