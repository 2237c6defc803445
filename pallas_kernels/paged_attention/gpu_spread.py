"""Where a step's few tokens go, on Hopper: as `gpu_write` says, by way of registers alone.

A step of few tokens waits for memory and not for much of it. So a token's kv heads are dealt out to many blocks of one warpgroup each: all
that a block needs leaves memory at once, is rotated in registers and goes straight to its places. Numbers are those of `gpu_write`, bit
for bit.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import hopper
from pallas_kernels.paged_attention.gpu_lines import Placed
from pallas_kernels.paged_attention.pool import LARGEST, SMALLEST, Pool

THREADS = 128


def filling(count: int) -> int:
    """How many rows of so many numbers fill the threads of a warpgroup; a power of two."""
    return THREADS // math.gcd(THREADS, count)


class Piece(NamedTuple):
    """Some rows of some kv heads, whose halves fill the threads: the first kv head (of a block's) and how many, the first row, how many."""

    head: int
    heads: int
    row: int
    rows: int


class Heads(NamedTuple):
    """Static shape of a token: each kv head has its group's queries as rows, then a key and a value."""

    kv_heads: int
    group: int
    head_dim: int

    @property
    def half(self) -> int:
        """Features that turn with as many others."""
        return self.head_dim // 2

    @property
    def at_once(self) -> int:
        """Rows whose halves fill the threads."""
        return filling(self.half)

    @property
    def dealt(self) -> int:
        """Kv heads of a block: so many that rows of a kind, from each of them, fill the threads."""
        return max(self.at_once // self._of_one(count) for count in (self.group, 2))

    @property
    def blocks(self) -> int:
        """Of a token. 0: it has fewer kv heads than a block needs."""
        return -(-self.kv_heads // self.dealt) if self.kv_heads >= self.dealt else 0

    def _of_one(self, count: int) -> int:
        """Rows of a piece out of `count` of a kv head."""
        return min(1 << (count.bit_length() - 1), self.at_once)

    def pieces(self, first: int, count: int) -> Iterator[Piece]:
        """The rows from `first` on; where they do not come out even, the last piece has rows of the one before it again."""
        rows = self._of_one(count)
        heads = self.at_once // rows
        for head in range(0, self.dealt, heads):
            for row in range(0, count, rows):
                yield Piece(head, heads, first + min(row, count - rows), rows)


class _Refs(NamedTuple):
    """The kernel's arrays."""

    qkv: Any
    waves: Any
    slots: Any
    lines: Any
    kv: list[Any]
    out: Any


def rotate_and_write(
    qkv: Float[Array, "tokens kv_heads rows head_dim"],
    waves: Float[Array, "tokens 2 at_once half"],
    slots: Int32[Array, "tokens"],
    lines: Int32[Array, "tokens"],
    kv: Pool,
    *,
    room: int,
) -> Placed:
    """See `gpu_write.rotate_and_write`; for heads that have `blocks`. A quantised pool gets codes and scales."""
    tokens, kv_heads, rows, head_dim = qkv.shape
    heads, pool = Heads(kv_heads, rows - 2, head_dim), jax.tree.map(jax.new_ref, kv)

    def body(qkv: Any, waves: Any, slots: Any, lines: Any, *refs: Any) -> None:
        _body(heads, _Refs(qkv, waves, slots, lines, [*refs[:-1]], refs[-1]))

    run = plgpu.kernel(
        hopper.named(body, __name__),
        out_type=jax.ShapeDtypeStruct((kv_heads, room, head_dim), qkv.dtype),
        grid=(heads.blocks, tokens),
        grid_names=("block", "token"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),  # threads share no memory
        interpret=hopper.interpretation(),
    )
    out = run(qkv, waves, slots, lines, *jax.tree.leaves(pool))
    return Placed(out, jax.tree.map(lambda ref: ref[...], pool))


def _body(heads: Heads, refs: _Refs) -> None:
    """All loads, then all arithmetic, then all stores. The last block begins early where heads do not come out even: what two blocks write
    is the same."""
    token = lax.axis_index("token")
    slot, line = refs.slots[token], refs.lines[token]
    begin = jnp.minimum(lax.axis_index("block") * heads.dealt, heads.kv_heads - heads.dealt)
    waves = [hopper.load(refs.waves.at[token, number], _layout((heads.at_once, heads.half))) for number in range(2)]
    queries, others = ([*heads.pieces(*rows)] for rows in ((0, heads.group), (heads.group, 2)))
    found = [_load(heads, refs.qkv.at[token], begin, piece) for piece in (*queries, *others)]
    turned = [_rotated(heads, piece, halves, waves) for piece, halves in zip((*queries, *others), found, strict=True)]
    turned = lax.optimization_barrier(turned)  # or the compiler loads a piece where it is stored, after it has waited for the line

    @pl.when(line >= 0)
    def _tile() -> None:
        for piece, halves in zip(queries, turned[: len(queries)], strict=True):
            for number, half in enumerate(halves):
                to = pl.ds(begin + piece.head, piece.heads), pl.ds(line + piece.row, piece.rows), _part(heads, number)
                refs.out[to] = half.astype(refs.out.dtype)

    @pl.when(slot >= 0)
    def _pool() -> None:
        for piece, halves in zip(others, turned[len(queries) :], strict=True):
            _write(heads, refs, begin, slot, piece, halves)


def _write(heads: Heads, refs: _Refs, begin: Any, slot: Any, piece: Piece, halves: Sequence[Any]) -> None:
    """Keys and values into the pool, which gets them as they are or as codes and scales."""
    values, *scales = refs.kv
    page_size = jnp.int32(values.shape[3])
    page, place = lax.div(slot, page_size), lax.rem(slot, page_size)
    head, which = begin + piece.head, piece.row - heads.group
    if scales:
        halves, found = _codes(piece, halves, values.dtype)
        for (one, row), scale in found.items():
            scales[0][page, head + one, which + row, place] = scale
    for number, half in enumerate(halves):
        values[page, pl.ds(head, piece.heads), pl.ds(which, piece.rows), place, _part(heads, number)] = half.astype(values.dtype)


def _codes(piece: Piece, halves: Sequence[Any], dtype: Any) -> tuple[list[Any], dict[tuple[int, int], Any]]:
    """As `pool.quantize`: what is to be stored as codes, and the scale of each vector of the piece."""
    low, high = halves
    sizes, largest, scales = jnp.maximum(jnp.abs(low), jnp.abs(high)), LARGEST[jnp.dtype(dtype).name], {}
    head, row = (plgpu.broadcasted_iota(jnp.int32, low.shape, dimension, layout=_layout(low.shape)) for dimension in range(2))
    whole = jnp.zeros_like(low)
    for vector in itertools.product(range(piece.heads), range(piece.rows)):
        mine = (head == vector[0]) & (row == vector[1])
        scales[vector] = jnp.maximum(jnp.max(jnp.where(mine, sizes, 0.0)) * np.float32(1 / largest), SMALLEST)
        whole = jnp.where(mine, scales[vector], whole)
    codes = [jnp.clip(half / whole, -largest, largest) for half in (low, high)]
    return [jnp.round(code) for code in codes] if jnp.issubdtype(dtype, jnp.integer) else codes, scales


def _layout(shape: tuple[int, ...]) -> Any:
    return plgpu.Layout.WG_STRIDED(shape, vec_size=1)


def _part(heads: Heads, number: int) -> Any:
    return pl.ds(number * heads.half, heads.half)


def _load(heads: Heads, token: Any, begin: Any, piece: Piece) -> list[Any]:
    """Both halves of a piece."""
    shape, at = (piece.heads, piece.rows, heads.half), (pl.ds(begin + piece.head, piece.heads), pl.ds(piece.row, piece.rows))
    return [hopper.load(token.at[*at, _part(heads, number)], _layout(shape)) for number in range(2)]


def _rotated(heads: Heads, piece: Piece, halves: list[Any], waves: list[Any]) -> tuple[Any, Any]:
    """A piece, turned (Su et al., arXiv 2104.09864, in the half-split form); values stay as they are."""
    value, (low, high) = heads.group + 1, (half.astype(jnp.float32) for half in halves)
    if piece.row == value:
        return low, high
    cosine, sine = (wave.reshape(low.shape) for wave in waves)
    turned = low * cosine - high * sine, high * cosine + low * sine
    if piece.row + piece.rows <= value:
        return turned
    turns = plgpu.broadcasted_iota(jnp.int32, low.shape, 1, layout=_layout(low.shape)) + piece.row != value
    return jnp.where(turns, turned[0], low), jnp.where(turns, turned[1], high)
