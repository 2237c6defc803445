"""Where blocks of keys and values lie in the pool, as rows of a matrix [pages * kv_heads * 2 * page, head_dim]."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Pages(NamedTuple):
    """Static shape of the pool and its tables: each page has, for each kv head, page_size keys and then page_size values.

    width is the number of pages in a row's table: a multiple of `pieces` of every block size in use.
    """

    kv_heads: int
    page_size: int
    width: int

    def piece(self, keys: int) -> int:
        """Keys of a block of `keys` that lie together: a page holds whole blocks, or a block whole pages."""
        return min(self.page_size, keys)

    def pieces(self, keys: int) -> int:
        """Pieces of a block."""
        return keys // self.piece(keys)

    def at(self, tables: Any, row: Any, head: Any, block: Any, keys: int) -> list[Any]:
        """First matrix row of the keys of each piece of a row's block; its values lie page_size further on."""
        if self.page_size >= keys:
            per_page = jnp.int32(self.page_size // keys)
            page, inside = lax.div(block, per_page), lax.rem(block, per_page) * keys
            return [pl.multiple_of(self._begin(tables[row * self.width + page], head) + inside, keys)]
        first = row * self.width + block * self.pieces(keys)
        return [pl.multiple_of(self._begin(tables[first + piece], head), self.page_size) for piece in range(self.pieces(keys))]

    def copy(self, pool: Any, at: list[Any], which: int, into: Any, barrier: Any) -> None:
        """Start copying a block's keys (which=0) or values (1) into shared memory; each piece arrives at the barrier once."""
        piece = into.shape[0] // len(at)
        for number, begin in enumerate(at):
            rows = pl.ds(begin + which * self.page_size, piece)
            plgpu.copy_gmem_to_smem(pool.at[rows], into.at[pl.ds(number * piece, piece)], barrier)

    def _begin(self, page: Any, head: Any) -> Any:
        return (page * self.kv_heads + head) * (2 * self.page_size)
