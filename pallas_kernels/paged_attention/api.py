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
from pallas_kernels.paged_attention.pool import LARGEST, KVLayout, Layout, Pool, QuantizedKV, code_dtype, values_of

OP = "paged_attention"


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class PagedMetadata:
    """Which tokens of a packed step belong to which row and where each row's cache lies; made once a step, shared by the layers.

    Rows [0, decode_rows) have at most `decode_tokens` tokens each (more than one to verify drafts): row i owns the packed tokens from
    i * decode_tokens on, of which the first query_lengths[i] are real and the others padding. The tokens of the other rows follow, rows in
    order, each row's tokens adjacent. An empty row has query length 0.

    page_tables: page ids of a row's cache in order; unused entries hold 0, the guard page.
    query_starts: first packed token of the row. query_lengths: tokens of the row in this step.
    kv_lengths: tokens of the row in the cache once this step's are written. decode_rows and decode_tokens are static.
    counters: the program's, for kernels that count (`pallas_kernels.shared_counters`).
    """

    page_tables: Int32[Array, "rows pages_per_row"]
    query_starts: Int32[Array, "rows"]
    query_lengths: Int32[Array, "rows"]
    kv_lengths: Int32[Array, "rows"]
    decode_rows: int
    decode_tokens: int = 1
    counters: Any = None

    @property
    def decode_size(self) -> int:
        """Packed tokens that the decode rows own."""
        return self.decode_rows * self.decode_tokens

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[int, int]]:
        """Five leaves; the others are static."""
        leaves = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in _LEAVES)
        return leaves, (self.decode_rows, self.decode_tokens)

    @classmethod
    def tree_unflatten(cls, static: tuple[int, int], leaves: tuple[Any, ...]) -> "PagedMetadata":
        """Rebuilt without checks: jax puts other things than arrays in here while it transforms."""
        self = object.__new__(cls)
        for name, leaf in zip((*_LEAVES, "decode_rows", "decode_tokens"), (*leaves, *static), strict=True):
            object.__setattr__(self, name, leaf)
        return self


_ARRAYS = ("page_tables", "query_starts", "query_lengths", "kv_lengths")
_LEAVES = (*_ARRAYS, "counters")


class PagedResult(NamedTuple):
    """Attention outputs (0 for padding tokens) and the pool with this step's keys and values in it."""

    out: Float[Array, "tokens heads head_dim"]
    kv: Pool


def kv_layout(implementation: str, *, kv_heads: int, head_dim: int, dtype: Any, kv_dtype: str | None = None) -> Layout:
    """The layout of the pool that `paged_attention` with the same implementation name reads and writes.

    dtype: that of the activations, and of keys and values unless kv_dtype ("int8" or "float8_e4m3fn") has them quantised. The result has
    the pool's structure: jax.tree.map over it makes the pool. "auto" may still turn to another implementation once it knows page size
    and heads: those it has for a platform share a layout.
    Raises ValueError for an unknown implementation or kv_dtype and NotImplementedError for one that does not exist or refuses.
    """
    require(kv_dtype is None or kv_dtype in LARGEST, OP, f"kv_dtype is {kv_dtype!r}", f"it must be None or one of {', '.join(LARGEST)}")
    known = {"kv_heads": kv_heads, "head_dim": head_dim, "dtype": jnp.dtype(dtype).name}
    module = dispatch.resolve(OP, implementation, dispatch.target(), known | ({"kv_dtype": kv_dtype} if kv_dtype else {}))
    return module.kv_layout(kv_heads=kv_heads, head_dim=head_dim, dtype=jnp.dtype(dtype), kv_dtype=kv_dtype)


def paged_attention(  # noqa: PLR0913
    q: Float[Array, "tokens heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    positions: Int32[Array, "tokens"],
    kv: Pool,
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
    Head h reads kv head h // (heads / kv_heads). Memory that belongs to no row, NaN included, never reaches a result. A quantised pool
    (`QuantizedKV`) gets the rotated k and v in codes with a scale for each token and kv head, and the step attends to what is written.

    Donate kv: it is updated in place. Raises ValueError when shapes or dtypes do not fit together, and NotImplementedError when an
    implementation that was asked for by name refuses them.
    """
    known = {"kv_heads": k.shape[1], "head_dim": k.shape[2], "dtype": k.dtype.name}
    layout = kv_layout(implementation, kv_heads=k.shape[1], head_dim=k.shape[2], dtype=k.dtype, kv_dtype=code_dtype(kv))
    check(q, k, v, positions, kv, metadata, extras=(rope, sinks), layout=layout)
    known |= {"heads": q.shape[1], "page_size": values_of(kv).shape[values_of(layout).dims.index("page")]}
    known |= {"kv_dtype": code_dtype(kv)} if code_dtype(kv) else {}
    known |= {"decode_tokens": metadata.decode_tokens} if metadata.decode_rows else {}
    module = dispatch.resolve(OP, implementation, dispatch.target(), known)
    return module.paged_attention(q, k, v, positions, kv, metadata, spec=spec, rope=rope, sinks=sinks)


def check(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    kv: Pool,
    metadata: PagedMetadata,
    *,
    extras: tuple[Array | None, Array | None],
    layout: Layout,
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


def _check_pool(kv: Pool, k: Array, layout: Layout) -> None:
    pages, page_size = None, None
    for name, array, lies in _parts(kv, layout):
        words = f"{jnp.dtype(lies.dtype).name} with dimensions {', '.join(lies.dims)}"
        remedy = f"make it as kv_layout(...).shape(pages, page_size) says: {words}, kv_heads={k.shape[1]}, head_dim={k.shape[2]}"
        require(array.ndim == len(lies.dims) and array.dtype == lies.dtype, OP, f"{name} is {describe(array)}", remedy)
        if pages is None or page_size is None:
            pages, page_size = array.shape[lies.dims.index("pages")], array.shape[lies.dims.index("page")]
        require(tuple(array.shape) == lies.shape(pages, page_size), OP, f"{name} is {describe(array)}", remedy)


def _parts(kv: Pool, layout: Layout) -> list[tuple[str, Array, KVLayout]]:
    if isinstance(kv, QuantizedKV) and isinstance(layout, QuantizedKV):
        return [("kv.values", kv.values, layout.values), ("kv.scales", kv.scales, layout.scales)]
    return [("kv", values_of(kv), values_of(layout))]


def _check_metadata(metadata: PagedMetadata, tokens: int) -> None:
    tables = metadata.page_tables
    require(tables.ndim == 2, OP, f"page_tables is {describe(tables)}", "it must have shape [rows, pages_per_row]")
    rows = tables.shape[0]
    for name in _ARRAYS:
        require_dtype(OP, name, getattr(metadata, name), jnp.int32, "page ids and lengths are int32")
    for name in _ARRAYS[1:]:
        require_shape(OP, name, getattr(metadata, name), (rows,), "one entry per row of page_tables")
    decode_rows, size, per_row = metadata.decode_rows, metadata.decode_size, metadata.decode_tokens
    words = f"decode_rows={decode_rows} with {rows} rows and {tokens} tokens" + (f" (decode_tokens={per_row})" if per_row != 1 else "")
    require(
        decode_rows >= 0 and per_row >= 1 and decode_rows <= rows and size <= tokens,
        OP,
        words,
        "row i < decode_rows owns decode_tokens packed tokens, so there can be no more of them than rows or tokens",
    )
    require(
        decode_rows < rows or size == tokens,
        OP,
        f"{tokens - size} tokens follow the {decode_rows} decode rows but no row is left to own them",
        "add rows for them or leave the tokens away",
    )
