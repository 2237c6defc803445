"""Named shapes of paged attention, shared by the contract test, the benchmarks and the tuner; `make` fills one with data.

The data is as hostile as a serving step can be: page tables are shuffled, every slot that belongs to no row (the guard page too) and
every padding token holds NaN, and ragged lengths are drawn from the edges: empty, 1, whole pages, one more and one less, full.
Large arrays of full rows (`BENCH`) are drawn where they are needed, on the device; then only the tables are shuffled.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import costs
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.paged_attention.api import PagedMetadata, PagedResult, kv_layout, paged_attention
from pallas_kernels.paged_attention.pool import LARGEST, Layout, Pool, QuantizedKV, values_of

Extras = frozenset[Literal["rope", "sinks"]]
ROPE: Extras = frozenset({"rope"})
SINKS: Extras = frozenset({"sinks"})
BOTH: Extras = ROPE | SINKS
NOTHING: Extras = frozenset()
LARGE = 1 << 20  # values of an array from which on numpy is too slow


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The pool of a case and its heads; kv_dtype: the codes of a quantised pool."""

    page_size: int = 16
    pages_per_row: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    dtype: str = "float32"
    kv_dtype: str | None = None


@dataclass(frozen=True)
class Case(Cache):
    """One compiled shape and the arithmetic it runs; extras names the optional inputs it has."""

    name: str
    decode_rows: int = 0
    prefill_rows: int = 0
    prefill_tokens: int = 0
    group: int = 3
    window: int | None = None
    soft_cap: float | None = None
    extras: Extras = ROPE
    lengths: Literal["ragged", "full"] = "ragged"
    decode_tokens: int = 1

    donates: ClassVar[tuple[str, ...]] = ("kv",)

    @property
    def rotates(self) -> tuple[str, ...]:
        """What differs from layer to layer; the metadata is made once for all of them."""
        return ("kv", "q", "k", "v")

    @property
    def spec(self) -> AttentionSpec:
        """The static arithmetic."""
        return AttentionSpec(self.head_dim**-0.5, window=self.window, soft_cap=self.soft_cap, rope_scale=1.1)

    def tuning_key(self) -> dict[str, int | str]:
        """The key that block sizes for this case are looked up by."""
        heads = self.kv_heads * self.group
        key: dict[str, int | str] = {
            "page_size": self.page_size,
            "kv_heads": self.kv_heads,
            "heads": heads,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
        }
        return key | ({"kv_dtype": self.kv_dtype} if self.kv_dtype else {})

    @property
    def slack(self) -> float:
        """Relative error that is due to numbers that lie between two codes: rounding on the way decides which one they get."""
        wide = self.dtype == "float32"
        return {None: 0.0, "int8": 5e-4 if wide else 8e-3}.get(self.kv_dtype, 4e-3 if wide else 2e-2)

    def layout(self, implementation: str) -> Layout:
        """The layout of this case's pool for an implementation."""
        return kv_layout(
            implementation, kv_heads=self.kv_heads, head_dim=self.head_dim, dtype=jnp.dtype(self.dtype), kv_dtype=self.kv_dtype
        )

    def make(self, seed: int, implementation: str = "reference") -> dict[str, Any]:
        """Inputs of `run`, the pool in the implementation's layout."""
        rng = np.random.default_rng(seed)
        rows = self.decode_rows + self.prefill_rows
        query_lengths, kv_lengths = self._lengths(rng)
        size = self.decode_rows * self.decode_tokens
        behind = size + np.cumsum(query_lengths[self.decode_rows :])
        starts = np.concatenate([np.arange(self.decode_rows) * self.decode_tokens, [size], behind[:-1]])[:rows]
        positions = np.full(size + self.prefill_tokens, -1)
        for start, queries, length in zip(starts, query_lengths, kv_lengths, strict=True):
            positions[start : start + queries] = np.arange(length - queries, length)
        tables = rng.permutation(rows * self.pages_per_row).reshape(rows, -1) + 1
        tables[np.arange(self.pages_per_row) * self.page_size >= kv_lengths[:, None]] = 0
        metadata = PagedMetadata(
            *(jnp.asarray(x.astype(np.int32)) for x in (tables, starts, query_lengths, kv_lengths)),
            decode_rows=self.decode_rows,
            decode_tokens=self.decode_tokens,
        )
        pool = self._pool(rng, tables, kv_lengths, implementation)
        made: dict[str, Any] = {"positions": positions}
        for name, heads in (("q", self.kv_heads * self.group), ("k", self.kv_heads), ("v", self.kv_heads)):
            made[name] = self._tokens(rng, positions, heads)
        if "sinks" in self.extras:
            made["sinks"] = _normal(rng, self.kv_heads * self.group)
        arrays = {name: jnp.asarray(x.astype(jnp.int32 if name == "positions" else jnp.dtype(self.dtype))) for name, x in made.items()}
        if "rope" in self.extras:
            arrays["rope"] = jnp.asarray((10000.0 ** -np.linspace(0, 1, self.head_dim // 2)).astype(np.float32))
        return arrays | {"kv": pool, "metadata": metadata}

    def run(self, inputs: dict[str, Any], implementation: str) -> PagedResult:
        """The op on what `make` gave for the same implementation."""
        optional = {"rope": None} | {name: inputs[name] for name in ("rope", "sinks") if name in inputs}
        required = [inputs[name] for name in ("q", "k", "v", "positions", "kv", "metadata")]
        return paged_attention(*required, spec=self.spec, implementation=implementation, **optional)

    def counted(self, inputs: dict[str, Any], counters: Any) -> dict[str, Any]:
        """Inputs with a program's counters."""
        return inputs | {"metadata": replace(inputs["metadata"], counters=counters)}

    def cost(self, inputs: dict[str, Any]) -> costs.Cost:
        """What the op must do on what `make` gave; the new keys and values count as keys and values that are read."""
        metadata, heads = inputs["metadata"], self.kv_heads * self.group
        sizes = {"heads": heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim, "itemsize": jnp.dtype(self.dtype).itemsize}
        sizes |= {"key_bytes": self.head_dim + 4} if self.kv_dtype else {}
        rows = zip(np.asarray(metadata.query_lengths).tolist(), np.asarray(metadata.kv_lengths).tolist(), strict=True)
        seen = [(queries, costs.causal(queries, length - queries, length, self.window)) for queries, length in rows]
        return costs.total([costs.attention(each, queries=queries, **sizes) for queries, each in seen])

    def canonical(self, kv: Pool, implementation: str) -> np.ndarray:
        """The numbers in an implementation's pool, in float64, by head: pages, kv_heads, kv, page, head_dim."""
        layout = self.layout(implementation)
        if not (isinstance(kv, QuantizedKV) and isinstance(layout, QuantizedKV)):
            return values_of(layout).by_head(np.asarray(kv, np.float64))
        scales = layout.scales.by_head(np.asarray(kv.scales, np.float64))
        with np.errstate(invalid="ignore"):  # codes of no row may be NaN
            return layout.values.by_head(np.asarray(kv.values, np.float64)) * scales[..., None]

    def _lengths(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Query and kv lengths per row."""
        capacity, page = self.page_size * self.pages_per_row, self.page_size
        decode, prefill = np.full(self.decode_rows, self.decode_tokens), np.zeros(self.prefill_rows, int)
        if self.lengths == "full":
            prefill[:] = min(self.prefill_tokens // max(self.prefill_rows, 1), capacity)
            return np.concatenate([decode, prefill]), np.full(len(decode) + len(prefill), capacity)
        if self.decode_tokens > 1:
            decode = rng.integers(1, self.decode_tokens + 1, len(decode))
        decode[rng.random(len(decode)) < 0.2] = 0
        left = self.prefill_tokens
        for row in rng.permutation(self.prefill_rows):
            prefill[row] = min(int(rng.choice([0, 1, page, page + 1, int(rng.integers(1, self.prefill_tokens + 1))])), left, capacity)
            left -= prefill[row]
        queries = np.concatenate([decode, prefill])
        whole = page * rng.integers(1, self.pages_per_row + 1, len(queries))
        wanted = np.choose(
            rng.integers(0, 7, len(queries)),
            [
                queries,
                whole - 1,
                whole,
                whole + 1,
                np.full_like(queries, capacity),
                rng.integers(1, capacity + 1, len(queries)),
                2 * queries,
            ],
        )
        return queries, np.where(queries > 0, np.clip(wanted, queries, capacity), 0)

    def _tokens(self, rng: np.random.Generator, positions: np.ndarray, heads: int) -> Any:
        """Values of the packed tokens: NaN where there is only padding."""
        shape = (len(positions), heads, self.head_dim)
        if self.lengths == "full" and np.prod(shape) >= LARGE and positions.min() >= 0:
            return draw(int(rng.integers(1 << 31)), shape, self.dtype)
        return np.where(positions[:, None, None] >= 0, _normal(rng, *shape), np.nan)

    def _pool(self, rng: np.random.Generator, tables: np.ndarray, kv_lengths: np.ndarray, implementation: str) -> Pool:
        """A pool: data where a row has tokens, NaN elsewhere; if it is large and its rows are full, data everywhere."""
        shape = (tables.size + 1, self.kv_heads, 2, self.page_size, self.head_dim)
        layout = self.layout(implementation)
        if self.lengths == "full" and np.prod(shape) >= LARGE:
            return self._drawn(int(rng.integers(1 << 31)), layout, shape[0])
        used = np.zeros((tables.size + 1, self.page_size), bool)
        slots = np.arange(self.pages_per_row * self.page_size).reshape(1, self.pages_per_row, self.page_size)
        used[tables] = slots < kv_lengths[:, None, None]
        used[0] = False
        used = used[:, None, None]
        if not isinstance(layout, QuantizedKV):
            pool = np.where(used[..., None], _normal(rng, *shape), np.float32(np.nan))
            return jnp.asarray(layout.laid(pool).astype(jnp.dtype(self.dtype)))
        largest, garbage = LARGEST[str(self.kv_dtype)], 127 if self.kv_dtype == "int8" else np.nan
        codes = np.clip(np.round(_normal(rng, *shape) * largest / 3), -largest, largest)
        codes = np.where(used[..., None], codes, np.float32(garbage)).astype(layout.values.dtype)
        scales = np.where(used, np.exp(_normal(rng, *shape[:-1]) / 2) * 3 / largest, np.float32(np.nan)).astype(np.float32)
        return QuantizedKV(jnp.asarray(layout.values.laid(codes)), jnp.asarray(layout.scales.laid(scales)))

    def _drawn(self, seed: int, layout: Layout, pages: int) -> Pool:
        """Data everywhere, made on the device."""
        if not isinstance(layout, QuantizedKV):
            return draw(seed, layout.shape(pages, self.page_size), self.dtype)
        shapes = layout.values.shape(pages, self.page_size), layout.scales.shape(pages, self.page_size)
        return jax.jit(_codes, static_argnums=(1, 2, 3))(jax.random.key(seed), *shapes, self.kv_dtype)


def draw(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Normal random values, made on the device."""
    return jax.jit(jax.random.normal, static_argnums=(1, 2))(jax.random.key(seed), shape, jnp.dtype(dtype))


def _codes(key: Any, shape: tuple[int, ...], scales: tuple[int, ...], kv_dtype: str) -> QuantizedKV:
    """Random codes, whose scales bring them to about the size of normal numbers."""
    bits = jax.random.bits(key, shape, jnp.uint8)
    codes = (bits & 0xBF).view(jnp.float8_e4m3fn) if kv_dtype != "int8" else bits.view(jnp.int8)  # no exponent of NaN
    unit = 1.0 if kv_dtype != "int8" else 1 / 64
    return QuantizedKV(codes, jax.random.uniform(key, scales, jnp.float32, unit / 2, 2 * unit))


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


CASES = (
    Case("decode", decode_rows=4, pages_per_row=18),
    Case("decode_one", decode_rows=1, page_size=32, pages_per_row=3, group=4, dtype="float16"),
    Case("decode_group8", decode_rows=3, page_size=64, pages_per_row=4, kv_heads=1, group=8, head_dim=128, dtype="bfloat16", soft_cap=5.0),
    Case("prefill", prefill_rows=3, prefill_tokens=90, pages_per_row=18, group=1, window=37),
    Case("mixed", decode_rows=3, prefill_rows=3, prefill_tokens=40, pages_per_row=9, group=4, soft_cap=8.0, extras=BOTH),
    Case("mixed_bfloat16", decode_rows=3, prefill_rows=2, prefill_tokens=40, page_size=8, dtype="bfloat16", window=50, extras=SINKS),
    Case("drafts", 3, 2, 20, pages_per_row=9, group=4, decode_tokens=5, window=23, extras=BOTH),
    Case("drafts_group16", 2, page_size=64, pages_per_row=3, kv_heads=1, group=16, dtype="bfloat16", decode_tokens=8),
    Case("int8", 3, 2, 40, pages_per_row=9, group=4, kv_dtype="int8", soft_cap=8.0, extras=BOTH),
    Case("int8_bfloat16", 3, 2, 40, page_size=64, pages_per_row=3, kv_heads=1, dtype="bfloat16", kv_dtype="int8", decode_tokens=2),
    Case("fp8", 3, 2, 40, page_size=32, pages_per_row=4, group=2, kv_dtype="float8_e4m3fn", window=50),
    Case("fp8_bfloat16", 3, 1, 30, page_size=32, group=8, kv_heads=1, dtype="bfloat16", kv_dtype="float8_e4m3fn", extras=SINKS),
)

TUNING = (
    Case("demo_decode", decode_rows=16, page_size=64, pages_per_row=8, lengths="full"),
    Case("demo_prefill", prefill_rows=2, prefill_tokens=512, page_size=64, pages_per_row=8, lengths="full"),
    Case("8b_decode", decode_rows=16, page_size=64, pages_per_row=16, kv_heads=8, group=4, head_dim=128, dtype="bfloat16", lengths="full"),
    Case(
        "8b_prefill",
        prefill_rows=1,
        prefill_tokens=1024,
        page_size=64,
        pages_per_row=16,
        kv_heads=8,
        group=4,
        head_dim=128,
        dtype="bfloat16",
        lengths="full",
    ),
)


def _bench(name: str, *, rows: int, keys: int, prefill: bool = False, **changes: Any) -> Case:
    """A case of bfloat16, 8 KV heads, 4 query heads each, and full rows: one new token a row, or all of them."""
    sizes: dict[str, Any] = {"page_size": 64, "group": 4, "head_dim": 128} | changes
    tokens = {"prefill_rows": rows, "prefill_tokens": rows * keys} if prefill else {"decode_rows": rows}
    pages = keys // sizes["page_size"]
    return Case(name, **tokens, **sizes, pages_per_row=pages, kv_heads=8, dtype="bfloat16", extras=NOTHING, lengths="full")


BENCH = (
    *(
        _bench(f"decode_{rows}x{keys}", rows=rows, keys=keys)
        for rows, keys in ((1, 1024), (16, 1024), (64, 1024), (16, 4096), (64, 4096), (256, 1024), (1, 65536), (1, 131072))
    ),
    *(_bench(f"decode_64x4096_page{size}", rows=64, keys=4096, page_size=size) for size in (16, 128)),
    *(_bench(f"decode_64x4096_group{group}", rows=64, keys=4096, group=group) for group in (1, 8, 16)),
    *(_bench(f"decode_64x4096_dim{head_dim}", rows=64, keys=4096, head_dim=head_dim) for head_dim in (64, 256)),
    *(
        _bench(f"decode_{rows}x{keys}_{dtype}", rows=rows, keys=keys, kv_dtype=dtype)
        for dtype in LARGEST
        for rows, keys in ((64, 4096), (1, 1024))
    ),
    *(_bench(f"decode_64x4096_tokens{tokens}", rows=64, keys=4096, decode_tokens=tokens) for tokens in (2, 4, 8)),
    _bench("prefill_8x4096_int8", rows=8, keys=4096, prefill=True, kv_dtype="int8"),
    *(_bench(f"prefill_{rows}x{keys}", rows=rows, keys=keys, prefill=True) for rows, keys in ((1, 2048), (1, 8192), (8, 4096))),
)
