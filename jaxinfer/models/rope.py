"""Rotary position embedding as a checkpoint describes it: which inverse frequencies each pair of features turns with.

Both forms that Hugging Face has used are read: `rope_theta` beside `rope_scaling`, and `rope_parameters`, which holds both. The
rotation itself happens inside the attention op; this file only makes the frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from jaxinfer.config import ConfigError
from jaxinfer.models.hf import Fields

TYPES = ("default", "linear", "llama3")


class Llama3Scaling(NamedTuple):
    """Long wavelengths are stretched by the factor, short ones kept, those between blended (Llama 3.1)."""

    low_frequency_factor: float
    high_frequency_factor: float
    original_context: float


@dataclass(frozen=True)
class Rope:
    """How positions turn features: frequencies theta^(-2i/dim), divided by `factor` in the way that `llama3` (or nothing) says."""

    theta: float = 10000.0
    factor: float = 1.0
    llama3: Llama3Scaling | None = None

    @classmethod
    def from_hf(cls, fields: Fields) -> Rope:
        """Read `rope_parameters`, or `rope_theta` and `rope_scaling`.

        Raises:
            ConfigError: a type other than default, linear and llama3, a missing number, or two descriptions that differ.
        """
        new, old = fields.table("rope_parameters"), fields.table("rope_scaling")
        if new is not None and old is not None and dict(new) != dict(old):
            raise ConfigError(
                f"{fields.where} describes rope twice and differently, in rope_parameters and rope_scaling; remove one of them"
            )
        theta = fields.number("rope_theta", default=cls.theta)
        given = new if new is not None else old
        return cls(theta) if given is None else cls._scaled(Fields(given, f"{fields.where}: rope"), given, theta)

    @classmethod
    def _scaled(cls, rope: Fields, given: Mapping[str, Any], theta: float) -> Rope:
        name = "type" if "type" in given and "rope_type" not in given else "rope_type"
        kind = rope.choice(name, TYPES, default="default")
        theta = rope.number("rope_theta", default=theta)
        if given.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ConfigError(
                f"{rope.where}: partial_rotary_factor {given['partial_rotary_factor']} is not implemented; only whole heads are rotated"
            )
        if kind == "default":
            return cls(theta)
        factor = rope.number("factor")
        if kind == "linear":
            return cls(theta, factor)
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise ConfigError(f"{rope.where}: high_freq_factor must be above low_freq_factor {low}, found {high}")
        return cls(theta, factor, Llama3Scaling(low, high, rope.number("original_max_position_embeddings")))

    def to_hf(self) -> dict[str, Any]:
        """The fields of a config.json that mean this."""
        if self.llama3 is not None:
            low, high, context = self.llama3
            scaled = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": int(context)}
            return {"rope_theta": self.theta, "rope_scaling": {"rope_type": "llama3", "factor": self.factor, **scaled}}
        linear = {"rope_scaling": {"rope_type": "linear", "factor": self.factor}} if self.factor != 1 else {}
        return {"rope_theta": self.theta, **linear}

    def frequencies(self, head_dim: int) -> Float32[np.ndarray, "half_dim"]:
        """Inverse frequencies in radians per position, computed in float64 (Su et al., arXiv 2104.09864; llama3: arXiv 2407.21783)."""
        inverse = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.llama3 is None:
            return (inverse / self.factor).astype(np.float32)
        low, high, context = self.llama3
        turns = context * inverse / (2 * math.pi)  # how often a pair turns around within the original context
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return ((1 - keep) * inverse / self.factor + keep * inverse).astype(np.float32)
