"""Which weight gets which scheme: one for all, and exceptions by the weights' names, as data and as the command line writes them.

    int8                                    every weight of a matmul
    int8,lm_head=keep,layers.0.*=keep       but the head and the first layer stay as they are
    layers.*.mlp.*=int4,layers.*=int8       two schemes; the rest stays as it is

A pattern is a shell pattern for a weight's dotted name, with or without the last part (`.weight`); the first that matches decides.
Embeddings, norms and biases are never quantised. This file knows no model: names come from the graph.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from jaxinfer.config import ConfigError
from jaxinfer.quant.find import find_scheme

KEEP = "keep"


@dataclass(frozen=True)
class Quantization:
    """The scheme of weights that no rule names (or "keep": they stay in the model's dtype), and rules (pattern, scheme or "keep").

    Raises:
        ConfigError: a scheme that does not exist.
    """

    scheme: str
    rules: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for scheme in (self.scheme, *(scheme for _, scheme in self.rules)):
            if scheme != KEEP:
                find_scheme(scheme)

    @classmethod
    def parse(cls, text: str) -> Quantization:
        """What the command line says: parts with commas between, PATTERN=SCHEME each and at most one SCHEME for all the rest.

        Raises:
            ConfigError: it is not of that form, or names a scheme that does not exist.
        """
        rest, rules = [], []
        for part in text.split(","):
            pattern, equals, scheme = (word.strip() for word in part.rpartition("="))
            if (equals and not pattern) or not scheme:
                raise ConfigError(f"--quantize {text!r}: {part!r} is neither SCHEME nor PATTERN=SCHEME, as in int8,lm_head=keep")
            if equals:
                rules.append((pattern, scheme))
            else:
                rest.append(scheme)
        if len(rest) > 1:
            raise ConfigError(f"--quantize {text!r}: {rest[0]!r} and {rest[1]!r} cannot both be for all weights; write PATTERN={rest[1]}")
        return cls(rest[0] if rest else KEEP, tuple(rules))

    def __str__(self) -> str:
        """As the command line writes it."""
        return ",".join([self.scheme, *(f"{pattern}={scheme}" for pattern, scheme in self.rules)])

    def scheme_of(self, name: str) -> str:
        """The scheme of the weight of that name, or "keep"."""
        return next((scheme for pattern, scheme in self.rules if _matches(name, pattern)), self.scheme)

    def check(self, names: Sequence[str]) -> None:
        """Test that each rule's pattern matches one of these names at least.

        Raises:
            ConfigError: one matches none; the message has the nearest name.
        """
        for pattern, _ in self.rules:
            if not any(_matches(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern, [*names, *map(_module, names)], n=1, cutoff=0.0)
                raise ConfigError(
                    f"quantisation rule {pattern!r} matches no weight of this model that can be quantised"
                    + (f"; the nearest name is {near[0]!r}" if near else "")
                )


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(_module(name), pattern)


def _module(name: str) -> str:
    return name.rpartition(".")[0]
