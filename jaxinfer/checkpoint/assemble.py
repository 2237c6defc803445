"""An array on a mesh out of pieces that are made when a device needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxinfer.models.weights import Slices
from jaxinfer.sharding import ArraySpec, Rules, named


@dataclass
class Kept:
    """Remembers one weight's pieces while it is being made: devices that hold the same piece share one read."""

    make: Callable[[Slices], np.ndarray]
    pieces: dict[tuple[tuple[int, int], ...], np.ndarray] = field(default_factory=dict)

    def get(self, index: Slices) -> np.ndarray:
        """The piece, made when first asked for."""
        key = tuple((part.start, part.stop) for part in index)
        if key not in self.pieces:
            self.pieces[key] = self.make(index)
        return self.pieces[key]


def assemble(spec: ArraySpec, mesh: Mesh, rules: Rules, piece: Callable[[Slices], np.ndarray]) -> Array:
    """The array on the mesh; piece() makes the slice that a device holds (start and stop given, step 1)."""

    def callback(index: tuple[slice, ...] | None) -> np.ndarray:
        whole = (slice(None),) * len(spec.shape) if index is None else index
        return piece(tuple(slice(*part.indices(size)[:2]) for part, size in zip(whole, spec.shape, strict=True)))

    return jax.make_array_from_callback(spec.shape, named(spec, mesh, rules), callback)
