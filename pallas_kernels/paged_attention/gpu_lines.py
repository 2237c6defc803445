"""How queries lie for the kernels on Hopper: as lines of tiles, in one array for each kv head. And how XLA brings them there.

A decode row has lines of its own; the tokens of other rows are cut into tiles of one row each. `place` rotates, writes the new keys and
values into the pages and lays the queries out in plain XLA; `gpu_write` does the same in one pass.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from pallas_kernels import hopper, hopper_tiles
from pallas_kernels.attention import AttentionSpec, rope_table, rotate
from pallas_kernels.paged_attention import packing
from pallas_kernels.paged_attention.api import PagedMetadata
from pallas_kernels.paged_attention.pool import Pool

NOWHERE = -1


class Placed(NamedTuple):
    """The queries as lines, and the pool with the new keys and values."""

    q: Float[Array, "kv_heads lines head_dim"]
    kv: Pool


class RowLines(NamedTuple):
    """Lines of a decode row: `tiles` tiles of the queries of `per_tile` of its `tokens` tokens, a group of each, padded to `padded` lines,
    what one copy into shared memory can bring."""

    group: int
    tokens: int

    @property
    def tiles(self) -> int:
        """Tiles of a row; its keys are read once for each."""
        return -(-self.tokens // (hopper.TILE // self.group))

    @property
    def per_tile(self) -> int:
        """Tokens of a tile."""
        return -(-self.tokens // self.tiles)

    @property
    def used(self) -> int:
        """Lines of a tile that hold a query."""
        return self.per_tile * self.group

    @property
    def padded(self) -> int:
        """Lines of a tile."""
        return self.used + -self.used % 8


class Lines(NamedTuple):
    """Where the tokens' queries lie: decode rows first, each with its tiles' lines, then whole tiles of the other rows."""

    line: Int32[Array, "tokens"]
    room: int
    row: RowLines
    tiles: packing.Blocks | None


def layout(positions: Int32[Array, "tokens"], metadata: PagedMetadata, group: int) -> Lines:
    """Where each token's queries go; tiles of the tokens that follow the decode rows are whole and begin where a tile may begin."""
    decode, row = metadata.decode_size, RowLines(group, metadata.decode_tokens)
    index = jnp.arange(decode, dtype=jnp.int32)
    token, tokens, per_tile = lax.rem(index, jnp.int32(row.tokens)), jnp.int32(row.tokens), jnp.int32(row.per_tile)
    tile = lax.div(index, tokens) * row.tiles + lax.div(token, per_tile)
    line = tile * row.padded + lax.rem(token, per_tile) * group
    used = metadata.decode_rows * row.tiles * row.padded
    tiles = None
    if positions.shape[0] > decode:
        per = hopper.TILE // group
        tiles = packing.cut(metadata, positions[decode:], hopper_tiles.CONSUMERS * per, 1)
        used += -used % hopper_tiles.LINES
        own = lax.div(tiles.place, jnp.int32(per)) * hopper.TILE + lax.rem(tiles.place, jnp.int32(per)) * group
        line = jnp.concatenate([line, used + own])
        used += tiles.row.shape[0] * hopper_tiles.LINES
    return Lines(jnp.where(positions >= 0, line, NOWHERE), used, row, tiles)


def place(  # noqa: PLR0913
    q: Float[Array, "tokens heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    positions: Int32[Array, "tokens"],
    kv: Pool,
    metadata: PagedMetadata,
    *,
    lines: Lines,
    spec: AttentionSpec,
    rope: Float[Array, "half_rotary"] | None,
) -> Placed:
    """Rotate queries and keys, write keys and values into the pages, lay the queries out. Donates kv."""
    if rope is not None:
        table = rope_table(positions, rope, spec.rope_scale)
        q, k = rotate(q, table), rotate(k, table)
    kv = packing.write(kv, k, v, positions, metadata)
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2])
    decode, parts, used = metadata.decode_size, [], 0
    if decode:
        parts.append(_of_rows(grouped[:decode], metadata.decode_rows, lines.row))
        used = parts[0].shape[1]
    if lines.tiles is not None:
        tiles = _of_tiles(grouped[decode:], lines.tiles)
        before = lines.room - tiles.shape[1] - used
        parts = [*(jnp.pad(part, ((0, 0), (0, before), (0, 0))) for part in parts), tiles]
    return Placed(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1), kv)


def _of_rows(q: Float[Array, "tokens kv_heads group head_dim"], rows: int, row: RowLines) -> Float[Array, "kv_heads lines head_dim"]:
    """Decode rows' queries, each tile padded to its lines."""
    _, kv_heads, _, head_dim = q.shape
    own = packing.by_row(q, rows)
    own = jnp.pad(own, ((0, 0), (0, 0), (0, row.tiles * row.used - own.shape[2]), (0, 0)))
    own = own.reshape(rows, kv_heads, row.tiles, row.used, head_dim)
    own = jnp.pad(own, ((0, 0), (0, 0), (0, 0), (0, row.padded - row.used), (0, 0)))
    return own.swapaxes(0, 1).reshape(kv_heads, -1, head_dim)


def _of_tiles(q: Float[Array, "tokens kv_heads group head_dim"], tiles: packing.Blocks) -> Float[Array, "kv_heads lines head_dim"]:
    """The other rows' queries: each warpgroup's tokens one after the other, each with its group, padded to a warpgroup's lines."""
    _, kv_heads, group, head_dim = q.shape
    own = packing.take(q, tiles.token).reshape(-1, hopper.TILE // group, kv_heads, group, head_dim)
    own = own.transpose(2, 0, 1, 3, 4).reshape(kv_heads, own.shape[0], -1, head_dim)
    own = jnp.pad(own, ((0, 0), (0, 0), (0, hopper.TILE - own.shape[2]), (0, 0)))
    return own.reshape(kv_heads, -1, head_dim)


def collect(
    lines: Float[Array, "kv_heads lines head_dim"], line: Int32[Array, "tokens"], *, first: int, group: int
) -> Float[Array, "prefill_tokens kv_heads group head_dim"]:
    """The outputs of each token from the `first` one on, which begin at its line; zeros for a token that is NOWHERE."""
    own = line[first:]
    each = jnp.maximum(own, 0)[:, None] + jnp.arange(group, dtype=jnp.int32)[None]
    out = packing.take(lines.transpose(1, 0, 2), each).transpose(0, 2, 1, 3)
    return jnp.where((own >= 0)[:, None, None, None], out, 0)
