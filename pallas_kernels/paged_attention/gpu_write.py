"""Where a step's tokens go, on Hopper: rotated queries to where the attention kernels read them, keys and values into the pages, and
the outputs of prefill tiles back to their tokens.

Few tokens are dealt out to many blocks (`gpu_spread`). Of many, one warpgroup takes each: its heads come into shared memory by halves
(TMA), are rotated in registers and leave again (TMA), each kv head's queries as consecutive lines, its new key and value straight into
the donated pool. So rope, the write and the layout of the queries are one pass over the projections. Knows no rows: where a token goes is
said by two integers.

It writes into the pool that it is given. XLA on GPUs may fuse such a call with an update of a slice around it (the results of lax.map or
lax.scan) and hand it another output: what compiles `place` inside one sets xla_gpu_enable_dynamic_slice_fusion to False.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import hopper
from pallas_kernels.attention import AttentionSpec, rope_table, rotate
from pallas_kernels.paged_attention import gpu_spread, packing
from pallas_kernels.paged_attention.api import PagedMetadata
from pallas_kernels.paged_attention.gpu_lines import NOWHERE, Lines, Placed
from pallas_kernels.paged_attention.pool import Pool, QuantizedKV, values_of

FEW = 16  # blocks for each core: as many are there at once, about, and `gpu_spread` is faster
ALIGNMENT = 128  # bytes: of a copy's shared memory


class Heads(NamedTuple):
    """Static shape of a token: each kv head has its group's queries, then a key and a value."""

    kv_heads: int
    group: int
    head_dim: int
    page_size: int

    @property
    def unit(self) -> int:
        """Halves of heads in shared memory that begin where a copy may begin."""
        return math.lcm(ALIGNMENT, self.head_dim) // self.head_dim

    @property
    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """Where a kv head's queries, its key and its value stand: first head in memory, first row in shared memory, how many."""
        key = self.group + -self.group % self.unit
        return (0, 0, self.group), (self.group, key, 1), (self.group + 1, key + self.unit, 1)

    @property
    def pitch(self) -> int:
        """Rows in shared memory of each kv head."""
        return self.segments[-1][1] + self.unit

    @property
    def half(self) -> int:
        """Features that turn with as many others."""
        return self.head_dim // 2

    @property
    def at_once(self) -> int:
        """Heads whose halves fill the threads of a warpgroup."""
        return gpu_spread.filling(self.half)

    @property
    def layout(self) -> Any:
        """How they are spread over the threads."""
        return plgpu.Layout.WG_STRIDED((self.at_once, self.half), vec_size=1)


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
    """As `gpu_lines.place`; where tokens are many XLA writes a quantised pool. Donates kv."""
    table = _table(positions, rope, spec, k.shape[2])
    (tokens, kv_heads, head_dim), page_size = k.shape, values_of(kv).shape[3]
    if table.shape[1] < head_dim:  # some features do not turn: the kernel pairs all of them, so this is done before
        q, k = rotate(q, table), rotate(k, table)
        table = _table(positions, None, AttentionSpec(1.0), head_dim)
    heads = Heads(kv_heads, q.shape[1] // kv_heads, head_dim, page_size)
    # parts of one projection in their order: XLA then makes no copy
    qkv = jnp.concatenate([q.reshape(tokens, kv_heads, -1, head_dim), k[:, :, None], v[:, :, None]], axis=2)
    row, number = packing.row_of_token(metadata, tokens), lax.div(jnp.maximum(positions, 0), jnp.int32(page_size))
    page = packing.take(metadata.page_tables, row, number)
    slots = jnp.where(positions >= 0, page * page_size + lax.rem(positions, jnp.int32(page_size)), NOWHERE)
    turns = waves(table, heads)
    if 0 < tokens * gpu_spread.Heads(kv_heads, heads.group, head_dim).blocks <= FEW * hopper.cores():
        return gpu_spread.rotate_and_write(qkv, turns, slots, lines.line, kv, room=lines.room)
    if not isinstance(kv, QuantizedKV):
        return rotate_and_write(qkv, turns, slots, lines.line, kv, room=lines.room)
    nothing = jnp.zeros((1, kv_heads, 2, page_size, head_dim), q.dtype)  # the kernel lays the queries out, XLA quantises and writes
    placed = rotate_and_write(qkv, turns, jnp.full_like(slots, NOWHERE), lines.line, nothing, room=lines.room)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)  # codes are made of what was not rounded before, as `gpu_spread` makes them
    return Placed(placed.q, packing.write(kv, rotate(k, table), v, positions, metadata))


def _table(
    positions: Int32[Array, "tokens"], rope: Float[Array, "half_rotary"] | None, spec: AttentionSpec, head_dim: int
) -> Float[Array, "tokens head_dim"]:
    """`rope_table` for all features: what is not rotated turns by nothing."""
    if rope is None:
        return jnp.concatenate([jnp.ones((len(positions), head_dim // 2)), jnp.zeros((len(positions), head_dim // 2))], axis=1)
    return rope_table(positions, rope, spec.rope_scale)


def waves(table: Float[Array, "tokens rotary"], heads: Heads) -> Float[Array, "tokens 2 at_once half"]:
    """What `attention.rope_table` gives, repeated for as many heads as are rotated at once: cosines, then sines."""
    parts = table.astype(jnp.float32).reshape(table.shape[0], 2, 1, heads.half)
    return jnp.broadcast_to(parts, (table.shape[0], 2, heads.at_once, heads.half))


def rotate_and_write(
    qkv: Float[Array, "tokens kv_heads rows head_dim"],
    waves: Float[Array, "tokens 2 at_once half"],
    slots: Int32[Array, "tokens"],
    lines: Int32[Array, "tokens"],
    kv: Float[Array, "pages kv_heads 2 page head_dim"],
    *,
    room: int,
) -> Placed:
    """Rotate queries and keys by `waves` and put everything in its place; donates kv.

    qkv: each kv head's queries as rows, then its key and its value. slots: page * page_size + place in the page of each token's key and
    value, or NOWHERE. lines: first line of each token's queries, or NOWHERE. room: lines; those that nothing is written to hold anything.
    """
    tokens, kv_heads, count, head_dim = qkv.shape
    heads = Heads(kv_heads, count - 2, head_dim, kv.shape[3])
    rows = heads.kv_heads * heads.pitch
    scratch = (
        plgpu.SMEM((2, rows + -rows % heads.at_once, heads.half), qkv.dtype),
        plgpu.Barrier(num_arrivals=2 * (1 if heads.unit == 1 else len(heads.segments) * heads.kv_heads)),
    )
    out = jax.ShapeDtypeStruct((heads.kv_heads, room, heads.head_dim), qkv.dtype)
    pool = jax.new_ref(kv.reshape(-1, heads.head_dim))  # plain rows: a copy's window is then what it seems to be
    run = hopper.kernel(
        lambda *refs: _body(heads, _Refs(*refs[:-1]), *refs[-1]), scratch, out_type=out, grid={"token": tokens}
    )
    return Placed(run(qkv.reshape(tokens, -1, head_dim), waves, slots, lines, pool), pool[...].reshape(kv.shape))


def collect(
    lines: Float[Array, "kv_heads lines head_dim"], line: Int32[Array, "tokens"], *, first: int, group: int
) -> Float[Array, "prefill_tokens kv_heads group head_dim"]:
    """The outputs of each token from the `first` one on, which begin at its line; zeros for a token that is NOWHERE.

    `line` comes whole: XLA would hand over a part of it as a pointer into the middle, which kernels refuse unless it is aligned.
    """
    kv_heads, _, head_dim = lines.shape
    scratch = (plgpu.SMEM((kv_heads, group, head_dim), lines.dtype), plgpu.Barrier())

    def body(lines: Any, line: Any, nothing: Any, out: Any, made: tuple[Any, Any]) -> None:
        token, (found, arrived) = lax.axis_index("token"), made
        own = line[first + token]
        pl.when(own >= 0)(lambda: plgpu.copy_gmem_to_smem(lines.at[:, pl.ds(own, group)], found, arrived))
        pl.when(own < 0)(lambda: plgpu.copy_gmem_to_smem(nothing, found, arrived))
        plgpu.barrier_wait(arrived)
        plgpu.copy_smem_to_gmem(found, out.at[token])
        plgpu.wait_smem_to_gmem(0)

    out = jax.ShapeDtypeStruct((line.shape[0] - first, kv_heads, group, head_dim), lines.dtype)
    run = hopper.kernel(body, scratch, out_type=out, grid={"token": out.shape[0]})
    return run(lines, line, jnp.zeros((kv_heads, group, head_dim), lines.dtype))


class _Refs(NamedTuple):
    """The kernel's arrays."""

    qkv: Any
    waves: Any
    slots: Any
    lines: Any
    kv: Any
    out: Any


def _body(heads: Heads, refs: _Refs, halves: Any, arrived: Any) -> None:
    token = lax.axis_index("token")
    parts = [pl.ds(number * heads.half, heads.half) for number in range(2)]
    _load(heads, refs.qkv.at[token], halves, parts, arrived)
    cosine, sine = (hopper.load(refs.waves.at[token, number], heads.layout) for number in range(2))
    plgpu.barrier_wait(arrived)
    for first in range(0, halves.shape[1], heads.at_once):
        _rotate(heads, halves, first, cosine, sine)
    plgpu.commit_smem()
    slot, line = refs.slots[token], refs.lines[token]
    page_size = jnp.int32(heads.page_size)
    page, place = lax.div(slot, page_size), lax.rem(slot, page_size)
    for head, number in itertools.product(range(heads.kv_heads), range(2)):
        part = parts[number]
        queries, *both = (halves.at[number].at[pl.ds(head * heads.pitch + row, count)] for _, row, count in heads.segments)

        @pl.when(slot >= 0)
        def _pool(head: int = head, part: Any = part, both: list[Any] = both) -> None:
            for which, rows in enumerate(both):
                row = ((page * heads.kv_heads + head) * 2 + which) * page_size + place
                plgpu.copy_smem_to_gmem(rows, refs.kv.at[pl.ds(row, 1), part])

        @pl.when(line >= 0)
        def _tile(head: int = head, part: Any = part, queries: Any = queries) -> None:
            plgpu.copy_smem_to_gmem(queries, refs.out.at[head, pl.ds(line, heads.group), part])

    plgpu.wait_smem_to_gmem(0)


def _load(heads: Heads, token: Any, halves: Any, parts: list[Any], arrived: Any) -> None:
    """Copy a token's heads into shared memory, in one piece where its parts begin at places that copies out may begin at, too."""
    for number, part in enumerate(parts):
        if heads.unit == 1:
            count = heads.kv_heads * heads.pitch
            plgpu.copy_gmem_to_smem(token.at[:, part], halves.at[number].at[pl.ds(0, count)], arrived)
            continue
        for head, (first, row, count) in itertools.product(range(heads.kv_heads), heads.segments):
            source = token.at[pl.ds(head * (heads.group + 2) + first, count), part]
            plgpu.copy_gmem_to_smem(source, halves.at[number].at[pl.ds(head * heads.pitch + row, count)], arrived)


def _rotate(heads: Heads, halves: Any, first: int, cosine: Any, sine: Any) -> None:
    """Rotate some heads in place (Su et al., arXiv 2104.09864, in the half-split form); values stay as they are."""
    rows = [halves.at[number].at[pl.ds(first, heads.at_once)] for number in range(2)]
    head = plgpu.broadcasted_iota(jnp.int32, (heads.at_once, heads.half), 0, layout=heads.layout) + first
    turns = lax.rem(head, jnp.full_like(head, heads.pitch)) != heads.segments[2][1]
    low, high = (hopper.load(row, heads.layout).astype(jnp.float32) for row in rows)
    rows[0][...] = jnp.where(turns, low * cosine - high * sine, low).astype(halves.dtype)
    rows[1][...] = jnp.where(turns, high * cosine + low * sine, high).astype(halves.dtype)
