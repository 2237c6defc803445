"""The pool of KV pages on the devices: one array per layer (two where it is quantised), in the layout that the attention op names.

The model describes the arrays (`Graph.kv_specs`), the op alone knows what their dimensions mean; this file holds the pool's size and
makes the arrays. With a data axis every replica has pages of its own: the page dimension is all replicas' pages, one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jaxinfer.sharding import Rules, zeros

CODES = {"auto": None, "int8": "int8", "fp8": "float8_e4m3fn"}  # settings, and the dtypes they mean


@dataclass(frozen=True)
class PoolShape:
    """Size of the pool. `pages` counts per data replica and includes the guard page. codes: dtype of quantised keys and values, or None."""

    pages: int
    page_size: int
    replicas: int = 1
    codes: str | None = None

    @property
    def all_pages(self) -> int:
        """Pages of all replicas, guard pages included: the arrays' page dimension."""
        return self.pages * self.replicas

    @property
    def tokens(self) -> int:
        """Tokens that all replicas hold together, guard pages not counted."""
        return (self.pages - 1) * self.page_size * self.replicas


def allocate(specs: Sequence[Any], mesh: Mesh, rules: Rules) -> tuple[Any, ...]:
    """The pool of every layer, filled with zeros, each device making its own part; specs: an ArraySpec for each array of each pool."""
    return tuple(jax.tree.map(lambda spec: zeros(spec, mesh, rules), layer) for layer in specs)
