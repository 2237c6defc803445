"""The kernel that writes prompts' new keys and values into the pool on TPU, page by page, in place.

Each page that a row's new tokens touch is one piece of work: its new slots, laid out beforehand as the page has them, and, where some of
its slots keep what they hold, the page as it was; both come to VMEM, are put together and leave. Pieces follow each other through a ring
of buffers. Knows no attention.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Shaped

from pallas_kernels import tensorcore
from pallas_kernels.paged_attention.packing import ceil_div, take
from pallas_kernels.paged_attention.pool import Pool, QuantizedKV, quantize, values_of
from pallas_kernels.paged_attention.tpu_plan import Rows
from pallas_kernels.tensorcore import Call, Copies

RING = 4  # pages in VMEM at once
FIELDS = 3  # of a piece


class Pieces(NamedTuple):
    """Pages to write: page id, first and last + 1 of the slots that are new, for each; which packed token each slot gets; how many."""

    fields: Int32[Array, "words"]
    tokens: Int32[Array, "pieces page"]
    total: Int32[Array, "1"]


class Scratch(NamedTuple):
    """VMEM: new slots and pages as they were; semaphores."""

    new: Any
    old: Any
    come: Any
    gone: Any


def pieces(rows: Rows, tables: Int32[Array, "rows width"], *, tokens: int, page_size: int) -> Pieces:
    """All pages that the rows' tokens touch; there is room for as many as there can be."""
    first = lax.div(rows.positions, jnp.int32(page_size))
    counts = jnp.where(rows.lengths > 0, ceil_div(rows.positions + rows.lengths, page_size) - first, 0)
    ends = jnp.cumsum(counts)
    count = counts.shape[0]
    room = min(-(-tokens // page_size) + 2 * count, tokens)
    index = jnp.arange(room, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None] <= index[:, None], axis=1, dtype=jnp.int32), count - 1)
    number = jnp.clip(take(first, row) + index - (take(ends, row) - take(counts, row)), 0, tables.shape[1] - 1)
    begin = take(rows.positions, row) - number * page_size
    end = begin + take(rows.lengths, row)
    slot = jnp.arange(page_size, dtype=jnp.int32)[None]
    token = jnp.clip(take(rows.starts, row)[:, None] + slot - begin[:, None], 0, tokens - 1)
    fields = jnp.stack([take(tables, row, number), jnp.maximum(begin, 0), jnp.minimum(end, page_size)], axis=1)
    return Pieces(fields.reshape(-1), token, ends[-1:])


def write(new: Pool, kv: Pool, work: Pieces) -> Pool:
    """The pool with the pieces written. new: like a pool, a page for each piece. Donate kv: updated in place."""
    given, pools = jax.tree.leaves(new), jax.tree.leaves(kv)
    scratch = Scratch(
        new=jax.tree.map(lambda x: pltpu.VMEM((RING, *x.shape[1:]), x.dtype), kv),
        old=jax.tree.map(lambda x: pltpu.VMEM((RING, *x.shape[1:]), x.dtype), kv),
        come=pltpu.SemaphoreType.DMA((RING,)),
        gone=pltpu.SemaphoreType.DMA((RING,)),
    )
    leaves, made = jax.tree.flatten(scratch)
    tree = jax.tree.structure(kv)

    def body(copies: Copies, scalars: Any, hbm: Any, _: Any, outputs: Any, own: Any) -> None:
        new, pool = jax.tree.unflatten(tree, hbm[: len(given)]), jax.tree.unflatten(tree, outputs)
        _body(copies, scalars, new, pool, jax.tree.unflatten(made, own))

    moved = 2 * sum(x.size * x.dtype.itemsize for x in given)
    call = Call(
        "paged_write",
        [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pools],
        leaves,
        {len(given) + number: number for number in range(len(pools))},
        pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
    )
    return jax.tree.unflatten(tree, tensorcore.run(call, body, (work.total, work.fields), (*given, *pools)))


def _body(copies: Copies, scalars: Any, new: Any, pool: Any, scratch: Scratch) -> None:
    total, fields = scalars[0][0], scalars[1]
    page_size = values_of(pool).shape[2]
    parts = list(zip(*(jax.tree.leaves(each) for each in (new, pool, scratch.new, scratch.old)), strict=True))

    def piece(number: Any) -> tuple[Any, Any, Any, Any]:
        begin, end = fields[FIELDS * number + 1], fields[FIELDS * number + 2]
        return fields[FIELDS * number], begin, end, (begin > 0) | (end < page_size)

    def come(number: Any, act: Any) -> None:
        slot, (page, _, _, kept) = lax.rem(number, jnp.int32(RING)), piece(number)
        for given, pages, fresh, old in parts:
            act(given.at[number], fresh.at[slot], scratch.come.at[slot])
            pl.when(kept)(lambda pages=pages, old=old: act(pages.at[page], old.at[slot], scratch.come.at[slot]))

    def go(number: Any, act: Any) -> None:
        slot, page = lax.rem(number, jnp.int32(RING)), fields[FIELDS * number]
        for _, pages, fresh, _ in parts:
            act(fresh.at[slot], pages.at[page], scratch.gone.at[slot])

    def join(number: Any) -> None:
        slot, (_, begin, end, kept) = lax.rem(number, jnp.int32(RING)), piece(number)

        @pl.when(kept)
        def _keep() -> None:
            for _, _, fresh, old in parts:
                fresh[slot] = _joined(fresh[slot], old[slot], begin, end, page_size)

    def step(number: Any, _: None) -> None:
        @pl.when(number < total)
        def _ahead() -> None:
            pl.when(number >= RING)(lambda: go(number - RING, copies.wait))
            come(number, copies.start)

        @pl.when(number > 0)
        def _behind() -> None:
            come(number - 1, copies.wait)
            join(number - 1)
            go(number - 1, copies.start)

    pl.when(total > 0)(lambda: lax.fori_loop(0, total + 1, step, None))
    lax.fori_loop(jnp.maximum(total - RING, 0), total, lambda number, _: go(number, copies.wait), None)


def _joined(new: Any, old: Any, begin: Any, end: Any, page_size: int) -> Any:
    """New slots [begin, end) of a page, the others as they were; a page's scales have its slots twice."""
    axis = 1
    index = lax.broadcasted_iota(jnp.int32, new.shape, axis)
    if new.ndim == 2:
        index = jnp.where(index >= page_size, index - page_size, index)
    mine = (index >= begin) & (index < end)
    if new.dtype == jnp.int8:
        return jnp.where(mine, new.astype(jnp.int32), old.astype(jnp.int32)).astype(jnp.int8)
    return jnp.where(mine, new.astype(jnp.float32), old.astype(jnp.float32)).astype(new.dtype)


def laid(
    k: Float[Array, "tokens kv_heads head_dim"], v: Float[Array, "tokens kv_heads head_dim"], kv: Pool, tokens: Int32[Array, "pieces page"]
) -> Pool:
    """Keys and values of the pieces' tokens, as pages of the pool have them."""
    lanes = values_of(kv).shape[3]
    new: Any = jnp.stack([k, v], axis=2)
    if isinstance(kv, QuantizedKV):
        new = quantize(new, kv.values.dtype)

    def pages(x: Shaped[Array, "tokens ..."]) -> Shaped[Array, "pieces ..."]:
        found = take(x, tokens)  # pieces, page, kv_heads, kv(, head_dim)
        if found.ndim == 4:
            return found.transpose(0, 2, 3, 1).reshape(found.shape[0], found.shape[2], -1)
        flat = found.swapaxes(1, 2).reshape(found.shape[0], found.shape[2], found.shape[1], -1)
        return jnp.pad(flat, ((0, 0), (0, 0), (0, 0), (0, lanes - flat.shape[3])))

    return jax.tree.map(pages, new)
