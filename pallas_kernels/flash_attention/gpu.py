"""Flash attention on Hopper GPUs: the kernel that paged attention's prefill uses, told where contiguous queries, keys and values lie.

Nothing is copied before or after it: TMA cuts tiles out of the arrays as they are, fills what is beyond an entry's end with zeros and
writes nothing there. Lengths that are no multiple of 8, and blocks larger than an array, are padded first. Query heads of one kv head
share a tile only where queries are too few to fill one: otherwise each has tiles of its own, which wastes less at the causal edge.
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch, hopper, hopper_tiles, tuning
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.flash_attention.api import SegmentIds, tuning_key
from pallas_kernels.hopper import TILE
from pallas_kernels.hopper_places import Tile

ROWS = 8  # of an array's rows that are one unit in shared memory


class Sizes(NamedTuple):
    """Keys of a block, and blocks in shared memory at once."""

    keys: int
    stages: int


def heuristic(platform: str, key: dispatch.Key) -> dict[str, int]:
    """Sizes that were never measured."""
    return Sizes(64 if int(key["head_dim"]) > 128 else 128, 2)._asdict()


def candidates(platform: str, key: dispatch.Key) -> list[dict[str, int]]:
    """Sizes worth measuring: those that fit in shared memory."""
    grid = [Sizes(keys, stages) for keys in (64, 128) for stages in (2, 3, 4)]
    return [sizes._asdict() for sizes in grid if hopper_tiles.shared_bytes(int(key["head_dim"]), *sizes) <= hopper.SHARED_BYTES]


def refusal(target: dispatch.Target, key: dispatch.Key) -> str | None:
    """Why the kernel cannot run on a target, or for what is known of a key (see `api.tuning_key`); None when it can."""
    return hopper.refusal(target, key)


class Queries(NamedTuple):
    """Lines of [batch, queries, heads * head_dim]: some heads, one after the other, each with the warpgroup's tokens."""

    heads: int

    @property
    def tokens(self) -> int:
        """Tokens of a warpgroup."""
        return TILE // self.heads

    @property
    def copies(self) -> int:
        """One for each head."""
        return self.heads

    def token(self, line: Any) -> Any:
        """Which of the warpgroup's tokens each line holds."""
        return line & (self.tokens - 1)

    def load(self, array: Any, tile: Tile, warpgroup: Any, into: Any, barrier: Any) -> None:
        """Start copying a warpgroup's lines into shared memory."""
        for head in range(self.heads):
            lines = into.at[pl.ds(head * self.tokens, self.tokens)]
            plgpu.copy_gmem_to_smem(self._place(array, tile, warpgroup, head, into.shape[1]), lines, barrier)

    def store(self, lines: Any, tile: Tile, warpgroup: Any, array: Any) -> None:
        """Start copying a warpgroup's results from shared memory."""
        for head in range(self.heads):
            own = lines.at[pl.ds(head * self.tokens, self.tokens)]
            plgpu.copy_smem_to_gmem(own, self._place(array, tile, warpgroup, head, lines.shape[1]))

    def _place(self, array: Any, tile: Tile, warpgroup: Any, head: int, head_dim: int) -> Any:
        rows = pl.ds(pl.multiple_of(tile.place + warpgroup * self.tokens, self.tokens), self.tokens)
        return array.at[tile.row, rows, pl.ds(pl.multiple_of((tile.head * self.heads + head) * head_dim, head_dim), head_dim)]


class Keys(NamedTuple):
    """Blocks of two arrays [batch, keys, kv_heads * head_dim]; `share` of the heads that tiles are counted in read one kv head."""

    share: int

    def copies(self, keys: int) -> int:
        """One."""
        return 1

    def find(self, arrays: tuple[Any, ...], tile: Tile, block: Any, keys: int) -> Any:
        """Entry, first key and kv head of a tile's block."""
        return tile.row, pl.multiple_of(block * keys, keys), lax.div(tile.head, jnp.int32(self.share))

    def copy(self, arrays: tuple[Any, ...], place: Any, which: int, into: Any, barrier: Any) -> None:
        """Start copying a block's keys (which=0) or values (1) into shared memory."""
        (row, first, head), (keys, head_dim) = place, into.shape
        columns = pl.ds(pl.multiple_of(head * head_dim, head_dim), head_dim)
        plgpu.copy_gmem_to_smem(arrays[which].at[row, pl.ds(first, keys), columns], into, barrier)


def flash_attention(  # noqa: PLR0913
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    *,
    spec: AttentionSpec,
    causal: Literal["causal", "full"],
    kv_lengths: Int32[Array, "batch"] | None,
    query_offsets: Int32[Array, "batch"] | None,
    sinks: Float[Array, "heads"] | None,
    segment_ids: SegmentIds | None,
) -> Float[Array, "batch queries heads head_dim"]:
    """See api.flash_attention."""
    (batch, queries, heads, head_dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    sizes = Sizes(**tuning.sizes("flash_attention", "gpu", dispatch.target(), tuning_key(q, kv_heads)))
    own = Queries(_together(queries, heads // kv_heads))
    plan = hopper_tiles.Plan(
        spec=spec,
        queries=own,
        source=Keys(heads // kv_heads // own.heads),
        heads=heads // own.heads,
        keys=sizes.keys,
        stages=sizes.stages,
        blocks=hopper.cores(),
    )
    lengths = jnp.full((batch,), keys, jnp.int32) if kv_lengths is None else jnp.minimum(kv_lengths, keys)
    offsets = jnp.zeros((batch,), jnp.int32) if query_offsets is None else query_offsets
    tiles = _tiles(queries, hopper_tiles.CONSUMERS * own.tokens, lengths, lengths if causal == "full" else offsets, causal=causal)
    query_ids, key_ids = (None, None) if segment_ids is None else (_lines(segment_ids.queries, own), _whole(segment_ids.keys, sizes.keys))
    inputs = hopper_tiles.Inputs(
        q=_matrix(q, own.tokens),
        kv=(_matrix(k, sizes.keys), _matrix(v, sizes.keys)),
        tiles=tiles.reshape(-1),
        total=jnp.full((1,), tiles.shape[0], jnp.int32),
        sinks=None if sinks is None else jnp.repeat(sinks.reshape(-1, own.heads), own.tokens, axis=1),
        query_ids=query_ids,
        key_ids=key_ids,
    )
    return hopper_tiles.attend(inputs, head_dim=head_dim, plan=plan)[:, :queries].reshape(q.shape)


def _together(queries: int, group: int) -> int:
    """Heads of a kv head that share a tile: as many, of 1, 2, 4 and 8, as the queries leave room for."""
    heads = 1
    while heads < 8 and group % (2 * heads) == 0 and queries * heads < hopper_tiles.LINES:
        heads *= 2
    return heads


def _tiles(
    queries: int, size: int, lengths: Int32[Array, "batch"], first: Int32[Array, "batch"], *, causal: Literal["causal", "full"]
) -> Int32[Array, "tiles 5"]:
    """hopper_tiles.TILE_FIELDS of every tile of `size` queries, entry after entry.

    first: position of each entry's first query; with "full" every query stands there, behind all keys.
    """
    batch, count = lengths.shape[0], -(-queries // size)
    place = jnp.tile(jnp.arange(count, dtype=jnp.int32) * size, batch)
    row = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), count)
    position = jnp.repeat(first, count) + (place if causal == "causal" else 0)
    return jnp.stack([place, row, position, jnp.minimum(queries - place, size), jnp.repeat(lengths, count)], axis=1)


def _matrix(x: Float[Array, "batch length heads head_dim"], block: int) -> Float[Array, "batch padded columns"]:
    """Heads side by side; padded to at least a block and to whole ROWS. Copies only if it has to pad."""
    batch, length, heads, head_dim = x.shape
    padded = max(length + -length % ROWS, block)
    return jnp.pad(x.reshape(batch, length, heads * head_dim), ((0, 0), (0, padded - length), (0, 0)))


def _whole(ids: Int32[Array, "batch length"], block: int) -> Int32[Array, "batch padded"]:
    return jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)))


def _lines(ids: Int32[Array, "batch queries"], own: Queries) -> Int32[Array, "tiles lines"]:
    """Ids of the lines of each tile, in the order of `_tiles`."""
    size = hopper_tiles.CONSUMERS * own.tokens
    cut = _whole(ids, size).reshape(ids.shape[0], -1, hopper_tiles.CONSUMERS, 1, own.tokens)
    return jnp.broadcast_to(cut, (*cut.shape[:3], own.heads, own.tokens)).reshape(-1, hopper_tiles.LINES)
