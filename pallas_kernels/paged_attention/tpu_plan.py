"""Who does what in a paged attention on TPU: packed tokens cut into blocks, and the list of (block, row) pairs that have to be attended to.

A block holds consecutive packed tokens, whosever they are; each row that has tokens in it makes one item. Items stand in the order of
their tokens, so a block's items are adjacent: its queries are copied once, and its results leave once. All in plain jnp, from the
metadata alone: the layers of a program ask for the same list and XLA computes it once. Knows no kernel.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from pallas_kernels.paged_attention.packing import ceil_div, take

FIELDS = ("block", "row", "begin", "end", "position", "page", "pages", "stop", "fresh", "final", "ordinal", "next")


class Rows(NamedTuple):
    """Rows whose packed tokens begin at `starts`, the first of them at position `positions`; `stops` keys are theirs."""

    starts: Int32[Array, "rows"]
    lengths: Int32[Array, "rows"]
    positions: Int32[Array, "rows"]
    stops: Int32[Array, "rows"]


class Items(NamedTuple):
    """The list, FIELDS after FIELDS, and where each core's part of it begins and the last one's ends.

    block and row; begin and end: the row's tokens in the block; position: of the block's first token, if it were the row's; page: the
    first one that is seen, an index into the row's table; pages: how many are; stop: the first key nobody sees; fresh, final: whether it
    is the block's first and last item; ordinal: blocks before this one; next: the first item of the next block.
    """

    fields: Int32[Array, "words"]
    bounds: Int32[Array, "cores_and_1"]


def room(tokens: int, block: int, rows: int) -> int:
    """Items that there can be at most."""
    blocks = -(-tokens // block)
    return rows if block * rows == tokens else blocks + rows


def items(rows: Rows, *, tokens: int, block: int, page_size: int, window: int | None, cores: int) -> Items:
    """Tokens [0, tokens), rows in order. A block's tokens that belong to no row are in no item."""
    first = lax.div(rows.starts, jnp.int32(block))
    last = lax.div(rows.starts + jnp.maximum(rows.lengths, 1) - 1, jnp.int32(block))
    counts = jnp.where(rows.lengths > 0, last - first + 1, 0)
    ends = jnp.cumsum(counts)
    total = ends[-1]
    index = jnp.arange(room(tokens, block, counts.shape[0]), dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None] <= index[:, None], axis=1, dtype=jnp.int32), counts.shape[0] - 1)
    number = take(first, row) + index - (take(ends, row) - take(counts, row))
    number = jnp.where(index < total, number, jnp.iinfo(jnp.int32).max // (2 * block))

    start = take(rows.starts, row) - number * block
    begin, end = jnp.maximum(start, 0), jnp.minimum(start + take(rows.lengths, row), block)
    position = take(rows.positions, row) - start
    stop = jnp.minimum(position + end, take(rows.stops, row))
    page = jnp.zeros_like(stop) if window is None else lax.div(jnp.maximum(position + begin - (window - 1), 0), jnp.int32(page_size))
    before, after = jnp.roll(number, 1), jnp.roll(number, -1)
    fresh = (index == 0) | (number != before)
    final = (index == total - 1) | (number != after)
    following = jnp.where(fresh & (index < total), index, index.shape[0])
    following = lax.cummin(jnp.roll(following, -1).at[-1].set(index.shape[0]), reverse=True)
    found = {
        "block": number, "row": row, "begin": begin, "end": end, "position": position, "page": page,
        "pages": ceil_div(jnp.maximum(stop, 0), page_size) - page, "stop": stop, "fresh": fresh, "final": final,
        "ordinal": jnp.cumsum(fresh.astype(jnp.int32)) - 1, "next": following,
    }  # fmt: skip
    fields = jnp.stack([found[name].astype(jnp.int32) for name in FIELDS], axis=1).reshape(-1)
    shares = [jnp.int32(0)]
    for core in range(1, cores):  # a block's items stay together
        wanted = lax.div(total * core, jnp.int32(cores))
        shares.append(jnp.minimum(jnp.min(jnp.where(fresh & (index >= wanted), index, index.shape[0])), total))
    return Items(fields, jnp.stack([*shares, total]))
