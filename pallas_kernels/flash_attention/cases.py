"""Named shapes of flash attention, shared by the contract test, the benchmarks and the tuner; `make` fills one with data.

Keys and values beyond an entry's length hold NaN. Lengths are drawn from the edges: 1, block sizes, one more and one less, full.
Large arrays without lengths (`BENCH`) are drawn where they are needed, on the device.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import costs
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.flash_attention.api import SegmentIds, flash_attention

Extras = frozenset[Literal["kv_lengths", "query_offsets", "sinks", "segment_ids"]]
RAGGED: Extras = frozenset({"kv_lengths"})
PACKED: Extras = frozenset({"segment_ids"})
EVERYTHING: Extras = frozenset({"kv_lengths", "query_offsets", "sinks"})
LARGE = 1 << 20  # values of q from which on numpy is too slow


@dataclass(frozen=True)
class Case:
    """One compiled shape and the arithmetic it runs; extras names the optional inputs it has."""

    name: str
    batch: int = 2
    queries: int = 64
    keys: int = 64
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 64
    dtype: str = "float32"
    causal: Literal["causal", "full"] = "causal"
    window: int | None = None
    soft_cap: float | None = None
    extras: Extras = frozenset()

    donates: ClassVar[tuple[str, ...]] = ()
    rotates: ClassVar[tuple[str, ...]] = ("q", "k", "v")

    @property
    def spec(self) -> AttentionSpec:
        """The static arithmetic."""
        return AttentionSpec(self.head_dim**-0.5, window=self.window, soft_cap=self.soft_cap)

    def tuning_key(self) -> dict[str, int | str]:
        """The key that block sizes for this case are looked up by."""
        return {"kv_heads": self.kv_heads, "heads": self.kv_heads * self.group, "head_dim": self.head_dim, "dtype": self.dtype}

    def make(self, seed: int, implementation: str = "reference") -> dict[str, Any]:
        """Inputs of `run`; the same for every implementation."""
        rng = np.random.default_rng(seed)
        if not self.extras and self.batch * self.queries * self.kv_heads * self.group * self.head_dim >= LARGE:
            return self._draw(seed)
        made = {"q": _normal(rng, self.batch, self.queries, self.kv_heads * self.group, self.head_dim)}
        for name in ("k", "v"):
            made[name] = _normal(rng, self.batch, self.keys, self.kv_heads, self.head_dim)
        if "sinks" in self.extras:
            made["sinks"] = _normal(rng, self.kv_heads * self.group)
        lengths = {}
        if "kv_lengths" in self.extras:
            edges = [1, 2, 127, 128, 129, self.keys - 1, self.keys, rng.integers(0, self.keys + 1)]
            lengths["kv_lengths"] = np.minimum(rng.choice(edges, self.batch), self.keys)
            beyond = np.arange(self.keys)[None] >= lengths["kv_lengths"][:, None]
            for name in ("k", "v"):
                made[name] = np.where(beyond[:, :, None, None], np.float32(np.nan), made[name])
        if "query_offsets" in self.extras:
            lengths["query_offsets"] = rng.integers(0, max(self.keys - self.queries, 0) + 1, self.batch)
        arrays = {name: jnp.asarray(x.astype(jnp.dtype(self.dtype))) for name, x in made.items()}
        arrays |= {name: jnp.asarray(x.astype(np.int32)) for name, x in lengths.items()}
        return arrays | ({"segment_ids": self._packed(rng, arrays.get("query_offsets"))} if "segment_ids" in self.extras else {})

    def _packed(self, rng: np.random.Generator, offsets: Any) -> SegmentIds:
        """Sequences of random lengths one after the other in each entry; a query belongs to the one that the key of its position does."""
        ids = np.cumsum(rng.random((self.batch, self.keys)) < 4 / self.keys, axis=1)
        offsets = np.zeros(self.batch, np.int32) if offsets is None else np.asarray(offsets)
        own = np.minimum(offsets[:, None] + np.arange(self.queries)[None], self.keys - 1)
        return SegmentIds(*(jnp.asarray(x.astype(np.int32)) for x in (np.take_along_axis(ids, own, 1), ids)))

    def run(self, inputs: dict[str, Any], implementation: str) -> jax.Array:
        """The op on what `make` gave."""
        rest = {name: inputs[name] for name in self.extras}
        return flash_attention(
            inputs["q"], inputs["k"], inputs["v"], spec=self.spec, causal=self.causal, implementation=implementation, **rest
        )

    def cost(self, inputs: dict[str, Any]) -> costs.Cost:
        """What the op must do on what `make` gave."""
        heads = self.kv_heads * self.group
        sizes = {"heads": heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim, "itemsize": jnp.dtype(self.dtype).itemsize}
        lengths = np.asarray(inputs.get("kv_lengths", np.full(self.batch, self.keys))).tolist()
        offsets = np.asarray(inputs.get("query_offsets", np.zeros(self.batch, int))).tolist()
        if self.causal == "full":
            seen = [costs.Seen(length, length * self.queries) for length in lengths]
        else:
            seen = [costs.causal(self.queries, first, length, self.window) for first, length in zip(offsets, lengths, strict=True)]
        return costs.total([costs.attention(each, queries=self.queries, **sizes) for each in seen])

    def _draw(self, seed: int) -> dict[str, Any]:
        heads = {"q": self.kv_heads * self.group, "k": self.kv_heads, "v": self.kv_heads}
        lengths = {"q": self.queries, "k": self.keys, "v": self.keys}
        normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
        return {
            name: normal(key, (self.batch, lengths[name], heads[name], self.head_dim), jnp.dtype(self.dtype))
            for name, key in zip(heads, jax.random.split(jax.random.key(seed), 3), strict=True)
        }


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


CASES = (
    Case("causal", queries=140, keys=140),
    Case("full", queries=5, keys=400, kv_heads=1, group=8, head_dim=128, dtype="bfloat16", causal="full", extras=RAGGED),
    Case("chunk", queries=90, keys=300, group=4, window=100, soft_cap=4.0, extras=EVERYTHING),
    Case("packed", queries=140, keys=140, group=2, extras=PACKED),
    Case("packed_chunk", queries=50, keys=300, group=1, extras=EVERYTHING | PACKED),
    Case("packed_full", queries=70, keys=200, kv_heads=1, causal="full", extras=RAGGED | PACKED),
)

TUNING = (
    Case("demo_1k", batch=1, queries=1024, keys=1024),
    Case("8b_2k", batch=1, queries=2048, keys=2048, kv_heads=8, group=4, head_dim=128, dtype="bfloat16"),
)


def _bench(name: str, *, batch: int = 1, length: int, head_dim: int = 128, **rest: Any) -> Case:
    """A case of bfloat16, 32 query heads and 8 KV heads, each query a key."""
    return Case(name, batch, length, length, kv_heads=8, group=4, head_dim=head_dim, dtype="bfloat16", **rest)


BENCH = (
    *(
        _bench(f"causal_{batch}x{length}_dim{head_dim}", batch=batch, length=length, head_dim=head_dim)
        for head_dim in (64, 128, 256)
        for batch, length in ((1, 1024), (1, 2048), (1, 4096), (1, 8192), (1, 16384), (4, 4096))
    ),
    _bench("full_1x4096_dim128", length=4096, causal="full"),
    _bench("window1024_1x8192_dim128", length=8192, window=1024),
)
