"""The pool of keys and values: what arrays it is made of, and how numbers become 8-bit codes and numbers again.

A pool is one array in the activations' dtype, or, quantised, a pair of arrays: codes, and a float32 scale for each token's keys and for
its values, per kv head (symmetric: the largest magnitude gets the largest code). A layout has the pool's own structure, with an array's
layout in place of each array: others treat both kinds alike with jax.tree.map. Knows no page tables and no attention.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.attention import accumulation_dtype

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # dtypes of codes, and the largest code
LANES = 128  # of a TPU's vector
BY_HEAD = ("pages", "kv_heads", "kv", "page", "head_dim")
SMALLEST = 1e-30  # scale of a token that is all zeros


class QuantizedKV(NamedTuple):
    """A pool in 8 bits, or what describes one: codes like a plain pool's array, and scales, which lack its head_dim."""

    values: Any
    scales: Any


@dataclass(frozen=True)
class KVLayout:
    """How one array of a layer's pool lies in memory: the names of its dimensions in order, and what fixes their sizes.

    dims: "pages" and "page" (tokens of a page) are sized by the caller, "kv_heads" and "head_dim" by the model, "kv" is 2. In "kv_lanes" a
    token's key and then its value lie side by side, filled up to whole lanes of a TPU; in "kv_page" a page's keys and then its values do.
    """

    dims: tuple[str, ...]
    kv_heads: int
    head_dim: int
    dtype: jnp.dtype

    def shape(self, pages: int, page_size: int) -> tuple[int, ...]:
        """Shape for a pool of `pages` pages, guard page included, of `page_size` tokens each."""
        sizes = {"pages": pages, "page": page_size, "kv_heads": self.kv_heads, "head_dim": self.head_dim, "kv": 2}
        sizes |= {"kv_lanes": -(-2 * self.head_dim // LANES) * LANES, "kv_page": 2 * page_size}
        return tuple(sizes[name] for name in self.dims)

    def laid(self, pool: Any) -> Any:
        """An array [pages, kv_heads, kv, page, head_dim] (without head_dim for scales) in this layout; NumPy's or jax's."""
        pages, kv_heads, _, page, *_ = pool.shape
        if "kv_page" in self.dims:
            return pool.reshape(pages, kv_heads, 2 * page)
        if "kv_lanes" not in self.dims:
            return pool.transpose(*(BY_HEAD.index(name) for name in self.dims))
        flat = pool.swapaxes(2, 3).reshape(pages, kv_heads, page, 2 * self.head_dim)
        rest = self.shape(pages, page)[-1] - 2 * self.head_dim
        return flat if not rest else _module(flat).concatenate([flat, _module(flat).zeros_like(flat[..., :rest])], axis=-1)

    def by_head(self, array: Any) -> Any:
        """The inverse of `laid`."""
        if "kv_page" in self.dims:
            return array.reshape(*array.shape[:2], 2, -1)
        if "kv_lanes" not in self.dims:
            return array.transpose(*(self.dims.index(name) for name in BY_HEAD if name in self.dims))
        pages, kv_heads, page, _ = array.shape
        return array[..., : 2 * self.head_dim].reshape(pages, kv_heads, page, 2, self.head_dim).swapaxes(2, 3)

    def axes(self) -> tuple[str | None, ...]:
        """Logical axis of each dimension: "pages" and "kv_heads" may be sharded, the others (None) never."""
        return tuple(name if name in ("pages", "kv_heads") else None for name in self.dims)


def _module(array: Any) -> Any:
    return np if isinstance(array, np.ndarray) else jnp


Layout = KVLayout | QuantizedKV
Pool = Array | QuantizedKV


def by_head(*, kv_heads: int, head_dim: int, dtype: Any, kv_dtype: str | None = None) -> Layout:
    """A page holds, for each kv head, its tokens' keys and then its tokens' values; scales alike."""
    dims = BY_HEAD
    if kv_dtype is None:
        return KVLayout(dims, kv_heads, head_dim, jnp.dtype(dtype))
    scales = KVLayout(dims[:-1], kv_heads, head_dim, jnp.dtype(jnp.float32))
    return QuantizedKV(KVLayout(dims, kv_heads, head_dim, jnp.dtype(kv_dtype)), scales)


def side_by_side(*, kv_heads: int, head_dim: int, dtype: Any, kv_dtype: str | None = None) -> Layout:
    """For TPUs: a page holds, for each kv head, its tokens, each with key and value side by side; scales fill lanes likewise."""
    values = KVLayout(("pages", "kv_heads", "page", "kv_lanes"), kv_heads, head_dim, jnp.dtype(kv_dtype or dtype))
    if kv_dtype is None:
        return values
    return QuantizedKV(values, KVLayout(("pages", "kv_heads", "kv_page"), kv_heads, head_dim, jnp.dtype(jnp.float32)))


def values_of(pool: Any) -> Any:
    """The array (or its description) that holds keys and values themselves."""
    return pool.values if isinstance(pool, QuantizedKV) else pool


def code_dtype(pool: Any) -> str | None:
    """Name of the codes' dtype; None for a plain pool."""
    return jnp.dtype(pool.values.dtype).name if isinstance(pool, QuantizedKV) else None


def quantize(x: Float[Array, "*tokens head_dim"], dtype: Any) -> QuantizedKV:
    """Codes of each vector and its scale; a vector with a NaN or an infinity becomes one whose every product is NaN."""
    largest, wide = LARGEST[jnp.dtype(dtype).name], x.astype(accumulation_dtype(x.dtype))
    scales = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1) / largest, SMALLEST)
    codes = jnp.clip(wide / scales[..., None], -largest, largest)
    codes = jnp.round(codes) if jnp.issubdtype(dtype, jnp.integer) else codes
    return QuantizedKV(codes.astype(dtype), scales)


def dequantize(pool: QuantizedKV, dtype: Any) -> Float[Array, "*tokens head_dim"]:
    """The numbers that codes and scales stand for."""
    wide = pool.scales.dtype
    return (pool.values.astype(wide) * pool.scales[..., None]).astype(dtype)
