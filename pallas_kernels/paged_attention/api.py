"""Attention of packed tokens over a paged pool of keys and values, and the pool's layout.

The life of the data: projected q, k and v of one step's packed tokens come in beside the pool; rope is applied, the new k and v are
written to their rows' pages, each token attends to its own row's cache, and the attention outputs leave with the updated pool. The
layout of the pool belongs to the implementation: others learn it from `kv_layout` only. Knows no model, no scheduler and no mesh:
under shard_map the page ids are those of the local pool.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.checks import describe, require, require_dtype, require_shape

OP = "paged_attention"


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class PagedMetadata:
    """Which tokens of a packed step belong to which row and where each row's cache lies; made once a step, shared by the layers.

    Rows [0, decode_rows) have at most one token each, and row i's token is packed token i. The tokens of the other rows follow from
    packed token `decode_rows` on, rows in order, each row's tokens adjacent. An empty row has query length 0.

    page_tables: page ids of a row's cache in order; unused entries hold 0, the guard page.
    query_starts: first packed token of the row. query_lengths: tokens of the row in this step.
    kv_lengths: tokens of the row in the cache once this step's are written. decode_rows: static.
    """

    page_tables: Int32[Array, "rows pages_per_row"]
    query_starts: Int32[Array, "rows"]
    query_lengths: Int32[Array, "rows"]
    kv_lengths: Int32[Array, "rows"]
    decode_rows: int

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], int]:
        """Four leaves; decode_rows is static."""
        return tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in _LEAVES), self.decode_rows

    @classmethod
    def tree_unflatten(cls, decode_rows: int, leaves: tuple[Any, ...]) -> "PagedMetadata":
        """Rebuilt without checks: jax puts other things than arrays in here while it transforms."""
        self = object.__new__(cls)
        for name, leaf in zip((*_LEAVES, "decode_rows"), (*leaves, decode_rows), strict=True):
            object.__setattr__(self, name, leaf)
        return self


_LEAVES = ("page_tables", "query_starts", "query_lengths", "kv_lengths")


@dataclass(frozen=True)
class KVLayout:
    """How an implementation lays out one layer's pool: the names of its dimensions in order, and what fixes their sizes.

    dims: "pages" and "page" (tokens of a page) are sized by the caller, "kv_heads" and "head_dim" by the model, "kv" is 2.
    """

    dims: tuple[str, ...]
    kv_heads: int
    head_dim: int
    dtype: jnp.dtype

    def shape(self, pages: int, page_size: int) -> tuple[int, ...]:
        """Shape of a pool of `pages` pages, guard page included, of `page_size` tokens each."""
        sizes = {"pages": pages, "page": page_size, "kv_heads": self.kv_heads, "head_dim": self.head_dim, "kv": 2}
        return tuple(sizes[name] for name in self.dims)

    def axes(self) -> tuple[str | None, ...]:
        """Logical axis of each dimension: "pages" and "kv_heads" may be sharded, the others (None) never."""
        return tuple(name if name in ("pages", "kv_heads") else None for name in self.dims)


class PagedResult(NamedTuple):
    """Attention outputs (0 for padding tokens) and the pool with this step's keys and values in it."""

    out: Float[Array, "tokens heads head_dim"]
    kv: Float[Array, "..."]


def kv_layout(implementation: str, *, kv_heads: int, head_dim: int, dtype: Any) -> KVLayout:
    """The layout of the pool that `paged_attention` with the same implementation name reads and writes.

    "auto" may still turn to another implementation once it knows page size and heads: those it has for a platform share a layout.
    Raises ValueError for an unknown implementation and NotImplementedError for one that does not exist or refuses.
    """
    known = {"kv_heads": kv_heads, "head_dim": head_dim, "dtype": jnp.dtype(dtype).name}
    module = dispatch.resolve(OP, implementation, dispatch.target(), known)
    return module.kv_layout(kv_heads=kv_heads, head_dim=head_dim, dtype=jnp.dtype(dtype))


def paged_attention(  # noqa: PLR0913
    q: Float[Array, "tokens heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    positions: Int32[Array, "tokens"],
    kv: Float[Array, "..."],
    metadata: PagedMetadata,
    *,
    spec: AttentionSpec,
    rope: Float[Array, "half_rotary"] | None,
    sinks: Float[Array, "heads"] | None = None,
    implementation: str = "auto",
) -> PagedResult:
    """Write k and v of the packed tokens into the pool and attend causally to each token's own row (PagedAttention, arXiv 2309.06180).

    A token at position p of its row is written to slot p % page of page p // page of the row's table and sees positions <= p (the
    newest `spec.window` of them); position -1 marks a padding token, which is written to the guard page 0 and whose output is 0.
    rope (inverse frequencies) rotates q and k first; None leaves them. sinks: one score per head that takes its share of the softmax.
    Head h reads kv head h // (heads / kv_heads). Memory that belongs to no row, NaN included, never reaches a result.

    Donate kv: it is updated in place. Raises ValueError when shapes or dtypes do not fit together, and NotImplementedError when an
    implementation that was asked for by name refuses them.
    """
    known = {"kv_heads": k.shape[1], "head_dim": k.shape[2], "dtype": k.dtype.name}
    layout = kv_layout(implementation, kv_heads=k.shape[1], head_dim=k.shape[2], dtype=k.dtype)
    check(q, k, v, positions, kv, metadata, extras=(rope, sinks), layout=layout)
    known |= {"heads": q.shape[1], "page_size": kv.shape[layout.dims.index("page")]}
    module = dispatch.resolve(OP, implementation, dispatch.target(), known)
    return module.paged_attention(q, k, v, positions, kv, metadata, spec=spec, rope=rope, sinks=sinks)


def check(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    kv: Array,
    metadata: PagedMetadata,
    *,
    extras: tuple[Array | None, Array | None],
    layout: KVLayout,
) -> None:
    """Refuse arguments that do not fit together (ValueError); extras is the pair (rope, sinks), layout what kv must look like."""
    _check_tokens(q, k, v, positions)
    _check_pool(kv, k, layout)
    _check_metadata(metadata, q.shape[0])
    rope, sinks = extras
    if rope is not None:
        require(
            rope.ndim == 1 and 2 * rope.shape[0] <= q.shape[2],
            OP,
            f"rope is {describe(rope)}",
            f"it must hold at most head_dim / 2 = {q.shape[2] // 2} inverse frequencies",
        )
        require_dtype(OP, "rope", rope, jnp.float32, "angles of long contexts need it")
    if sinks is not None:
        require_shape(OP, "sinks", sinks, (q.shape[1],), "one score per query head")


def _check_tokens(q: Array, k: Array, v: Array, positions: Array) -> None:
    require(q.ndim == 3, OP, f"q is {describe(q)}", "it must have shape [tokens, heads, head_dim]")
    require(k.ndim == 3, OP, f"k is {describe(k)}", "it must have shape [tokens, kv_heads, head_dim]")
    tokens, heads, head_dim = q.shape
    require_shape(OP, "k", k, (tokens, k.shape[1], head_dim), "tokens, kv_heads, head_dim, as q has them")
    require_shape(OP, "v", v, tuple(k.shape), "that of k")
    require(heads % k.shape[1] == 0, OP, f"{heads} query heads over {k.shape[1]} kv heads", "query heads must be a multiple of kv heads")
    require(jnp.issubdtype(q.dtype, jnp.floating), OP, f"q is {describe(q)}", "it must be of a floating dtype")
    require_dtype(OP, "k", k, q.dtype, "that of q")
    require_dtype(OP, "v", v, q.dtype, "that of q")
    require_shape(OP, "positions", positions, (tokens,), "one position per packed token")
    require_dtype(OP, "positions", positions, jnp.int32, "-1 marks padding")


def _check_pool(kv: Array, k: Array, layout: KVLayout) -> None:
    words = f"{layout.dtype.name} with dimensions {', '.join(layout.dims)}"
    remedy = f"make it as kv_layout(...).shape(pages, page_size) says: {words}, kv_heads={k.shape[1]}, head_dim={k.shape[2]}"
    require(kv.ndim == len(layout.dims) and kv.dtype == layout.dtype, OP, f"kv is {describe(kv)}", remedy)
    pages, page_size = kv.shape[layout.dims.index("pages")], kv.shape[layout.dims.index("page")]
    require(tuple(kv.shape) == layout.shape(pages, page_size), OP, f"kv is {describe(kv)}", remedy)


def _check_metadata(metadata: PagedMetadata, tokens: int) -> None:
    tables = metadata.page_tables
    require(tables.ndim == 2, OP, f"page_tables is {describe(tables)}", "it must have shape [rows, pages_per_row]")
    rows = tables.shape[0]
    for name in _LEAVES:
        require_dtype(OP, name, getattr(metadata, name), jnp.int32, "page ids and lengths are int32")
    for name in _LEAVES[1:]:
        require_shape(OP, name, getattr(metadata, name), (rows,), "one entry per row of page_tables")
    decode_rows = metadata.decode_rows
    require(
        0 <= decode_rows <= min(rows, tokens),
        OP,
        f"decode_rows={decode_rows} with {rows} rows and {tokens} tokens",
        "row i < decode_rows owns packed token i, so there can be no more of them than rows or tokens",
    )
    require(
        decode_rows < rows or decode_rows == tokens,
        OP,
        f"{tokens - decode_rows} tokens follow the {decode_rows} decode rows but no row is left to own them",
        "add rows for them or leave the tokens away",
    )
