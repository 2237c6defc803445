"""What `hopper_tiles` has to know for ragged tiles of queries over their rows' pages: where paged attention keeps things.

Queries come as lines [kv_heads, lines, head_dim], places of LINES each: each kv head's group of queries is packed into the tile, token
after token. Keys and values lie in the pool's pages, which the rows' tables name.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import TILE
from pallas_kernels.hopper_places import Tile
from pallas_kernels.hopper_tiles import LINES
from pallas_kernels.paged_attention.gpu_pages import Pages


class Queries(NamedTuple):
    """Lines of a warpgroup: its tokens one after the other, each with the group's heads."""

    group: int

    @property
    def tokens(self) -> int:
        """Tokens of a warpgroup."""
        return TILE // self.group

    @property
    def copies(self) -> int:
        """One."""
        return 1

    def token(self, line: Any) -> Any:
        """Which of the warpgroup's tokens each line holds."""
        power = self.group & (self.group - 1) == 0
        return line >> (self.group.bit_length() - 1) if power else lax.div(line, jnp.full_like(line, self.group))

    def load(self, array: Any, tile: Tile, warpgroup: Any, into: Any, barrier: Any) -> None:
        """Start copying a warpgroup's lines into shared memory."""
        plgpu.copy_gmem_to_smem(self._lines(array, tile, warpgroup), into, barrier)

    def store(self, lines: Any, tile: Tile, warpgroup: Any, array: Any) -> None:
        """Start copying a warpgroup's results from shared memory."""
        plgpu.copy_smem_to_gmem(lines, self._lines(array, tile, warpgroup))

    def _lines(self, array: Any, tile: Tile, warpgroup: Any) -> Any:
        return array.at[tile.head, pl.ds(tile.place * LINES + warpgroup * TILE, TILE)]


class Keys(NamedTuple):
    """Blocks in the pool [pool_rows, head_dim], found through the flat tables."""

    pages: Pages

    def copies(self, keys: int) -> int:
        """One for each piece."""
        return self.pages.pieces(keys)

    def find(self, arrays: tuple[Any, ...], tile: Tile, block: Any, keys: int) -> Any:
        """First row of each piece."""
        return self.pages.at(arrays[1], tile.row, tile.head, block, keys)

    def copy(self, arrays: tuple[Any, ...], place: Any, which: int, into: Any, barrier: Any) -> None:
        """Start copying a block's keys (which=0) or values (1) into shared memory."""
        self.pages.copy(arrays[0], place, which, into, barrier)
