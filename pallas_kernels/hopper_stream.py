"""Stream-K on Hopper GPUs: a weight cut into blocks, dealt out in equal runs to blocks of threads that stay for the whole kernel.

A weight [outputs, inputs] is cut into `tiles` of outputs and each tile, along its inputs, into `length` blocks. All blocks, tile by tile,
go in equal runs to `workers`, one per multiprocessor (Osama et al., arXiv 2301.03598). Where a run ends inside a tile, the tile's sums
come in several parts, which whatever consumes them adds up in order. Who does what follows from static shapes alone. Knows no dtype.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float


class Deal(NamedTuple):
    """`tiles` tiles of `length` blocks each, dealt out to `workers` (no more than there are blocks)."""

    tiles: int
    length: int
    workers: int

    @property
    def total(self) -> int:
        """Blocks of the whole weight."""
        return self.tiles * self.length

    def begin(self, worker: Any) -> Any:
        """The first block of a worker; that of worker + 1 ends its run."""
        return lax.div(worker * self.total, jnp.int32(self.workers))

    def owner(self, number: Any) -> Any:
        """Who has a block."""
        return ((number + 1) * self.workers - 1) // self.total

    def parts(self) -> np.ndarray:
        """Of how many workers each tile has sums."""
        begin = np.arange(self.tiles, dtype=np.int64) * self.length
        return self.owner(begin + self.length - 1) - self.owner(begin) + 1

    def tile(self, number: Any) -> Any:
        """The tile of a block."""
        return lax.div(number, jnp.int32(self.length))

    def place(self, number: Any) -> Any:
        """Which block of its tile a block is."""
        return lax.rem(number, jnp.int32(self.length))

    def part(self, worker: Any, tile: Any) -> Any:
        """The number of the part that a worker's sums of a tile are."""
        return worker - lax.div((tile * self.length + 1) * self.workers - 1, jnp.int32(self.total))


def add_up(parts: Float[Array, "parts tokens out"], deal: Deal) -> Float[Array, "tokens out"]:
    """The sums of all parts, in order; a part that nobody has may hold anything."""
    count = np.repeat(deal.parts(), parts.shape[2] // deal.tiles)
    total = parts[0]
    for number in range(1, parts.shape[0]):
        total = total + jnp.where(jnp.asarray(count > number), parts[number], 0)
    return total
