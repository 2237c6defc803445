"""Where a step's tokens go, on Hopper: rotated queries to where the attention kernels read them, keys and values into the pages, and
the outputs of prefill tiles back to their tokens.

One warpgroup takes one token: its heads come into shared memory by halves (TMA), are rotated in registers and leave again (TMA), each
kv head's queries as consecutive lines, its new key and value straight into the donated pool. So rope, the write and the layout of the
queries are one pass over the projections. Knows no rows: where a token goes is said by two integers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import hopper

THREADS = 128
NOWHERE = -1


class Placed(NamedTuple):
    """The queries as lines, and the pool with the new keys and values."""

    q: Float[Array, "kv_heads lines head_dim"]
    kv: Float[Array, "pages kv_heads 2 page head_dim"]


class Heads(NamedTuple):
    """Static shape of a token: each kv head has its group's queries, then a key and a value."""

    kv_heads: int
    group: int
    head_dim: int

    @property
    def count(self) -> int:
        """Heads of all kinds."""
        return self.kv_heads * (self.group + 2)

    @property
    def half(self) -> int:
        """Features that turn with as many others."""
        return self.head_dim // 2

    @property
    def at_once(self) -> int:
        """Heads whose halves fill the threads of a warpgroup."""
        return next(heads for heads in range(1, THREADS + 1) if heads * self.half % THREADS == 0)

    @property
    def layout(self) -> Any:
        """How they are spread over the threads."""
        return plgpu.Layout.WG_STRIDED((self.at_once, self.half), vec_size=1)


def waves(table: Float[Array, "tokens rotary"], heads: Heads) -> Float[Array, "tokens 2 at_once half"]:
    """What `attention.rope_table` gives, repeated for as many heads as are rotated at once: cosines, then sines."""
    parts = table.astype(jnp.float32).reshape(table.shape[0], 2, 1, heads.half)
    return jnp.broadcast_to(parts, (table.shape[0], 2, heads.at_once, heads.half))


def rotate_and_write(
    qkv: Float[Array, "tokens heads head_dim"],
    waves: Float[Array, "tokens 2 at_once half"],
    slots: Int32[Array, "tokens"],
    lines: Int32[Array, "tokens"],
    kv: Float[Array, "pages kv_heads 2 page head_dim"],
    *,
    heads: Heads,
    room: int,
) -> Placed:
    """Rotate queries and keys by `waves` and put everything in its place; donates kv.

    slots: page * page_size + place in the page of each token's key and value, or NOWHERE. lines: first line of each token's queries, or
    NOWHERE. room: lines; those that nothing is written to hold anything.
    """
    whole = heads.count + -heads.count % heads.at_once
    scratch = (plgpu.SMEM((2, whole, heads.half), qkv.dtype), plgpu.Barrier(num_arrivals=2))
    out = jax.ShapeDtypeStruct((heads.kv_heads, room, heads.head_dim), qkv.dtype)
    pool = jax.new_ref(kv)
    run = hopper.kernel(
        lambda *refs: _body(heads, _Refs(*refs[:-1]), *refs[-1]), scratch, out_type=out, grid={"token": qkv.shape[0]}, warpgroups=1
    )
    return Placed(run(qkv, waves, slots, lines, pool), pool[...])


def collect(
    lines: Float[Array, "kv_heads lines head_dim"], line: Int32[Array, "tokens"], *, group: int
) -> Float[Array, "tokens kv_heads group head_dim"]:
    """Each token's outputs, from its first line on; zeros for a token that is NOWHERE."""
    kv_heads, _, head_dim = lines.shape
    scratch = (plgpu.SMEM((kv_heads, group, head_dim), lines.dtype), plgpu.Barrier())

    def body(lines: Any, line: Any, out: Any, made: tuple[Any, Any]) -> None:
        token, (found, arrived) = lax.axis_index("token"), made
        first = line[token]

        @pl.when(first >= 0)
        def _copy() -> None:
            plgpu.copy_gmem_to_smem(lines.at[:, pl.ds(first, group)], found, arrived)
            plgpu.barrier_wait(arrived)

        @pl.when(first < 0)
        def _clear() -> None:
            found[...] = plgpu.layout_cast(jnp.full(found.shape, 0, found.dtype), plgpu.Layout.WG_STRIDED(found.shape, vec_size=1))
            plgpu.commit_smem()

        plgpu.copy_smem_to_gmem(found, out.at[token])
        plgpu.wait_smem_to_gmem(0)

    out = jax.ShapeDtypeStruct((line.shape[0], kv_heads, group, head_dim), lines.dtype)
    return hopper.kernel(body, scratch, out_type=out, grid={"token": line.shape[0]}, warpgroups=1)(lines, line)


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
    for number, part in enumerate(parts):
        plgpu.copy_gmem_to_smem(refs.qkv.at[token, :, part], halves.at[number].at[pl.ds(0, heads.count)], arrived)
    cosine, sine = (hopper.load(refs.waves.at[token, number], heads.layout) for number in range(2))
    plgpu.barrier_wait(arrived)
    for first in range(0, heads.count, heads.at_once):
        _rotate(heads, halves, first, cosine, sine)
    plgpu.commit_smem()
    slot, line = refs.slots[token], refs.lines[token]
    page, place = lax.div(slot, jnp.int32(refs.kv.shape[3])), lax.rem(slot, jnp.int32(refs.kv.shape[3]))
    for head in range(heads.kv_heads):
        first = head * (heads.group + 2)
        for number, part in enumerate(parts):
            queries = halves.at[number].at[pl.ds(first, heads.group)]
            both = halves.at[number].at[pl.ds(first + heads.group, 2)]

            @pl.when(slot >= 0)
            def _pool(head: int = head, part: Any = part, both: Any = both) -> None:
                plgpu.copy_smem_to_gmem(both, refs.kv.at[page, head, :, place, part])

            @pl.when(line >= 0)
            def _tile(head: int = head, part: Any = part, queries: Any = queries) -> None:
                plgpu.copy_smem_to_gmem(queries, refs.out.at[head, pl.ds(line, heads.group), part])

    plgpu.wait_smem_to_gmem(0)


def _rotate(heads: Heads, halves: Any, first: int, cosine: Any, sine: Any) -> None:
    """Rotate some heads in place (Su et al., arXiv 2104.09864, in the half-split form); values stay as they are."""
    rows = [halves.at[number].at[pl.ds(first, heads.at_once)] for number in range(2)]
    head = plgpu.broadcasted_iota(jnp.int32, (heads.at_once, heads.half), 0, layout=heads.layout) + first
    turns = lax.rem(head, jnp.full_like(head, heads.group + 2)) < heads.group + 1
    low, high = (hopper.load(row, heads.layout).astype(jnp.float32) for row in rows)
    rows[0][...] = jnp.where(turns, low * cosine - high * sine, low).astype(halves.dtype)
    rows[1][...] = jnp.where(turns, high * cosine + low * sine, high).astype(halves.dtype)
