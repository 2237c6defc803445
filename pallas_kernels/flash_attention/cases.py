"""Named shapes of flash attention, shared by the contract test, the benchmarks and the tuner; `make` fills one with data.

Keys and values beyond an entry's length hold NaN. Lengths are drawn from the edges: 1, block sizes, one more and one less, full.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import AttentionSpec
from pallas_kernels.flash_attention.api import SegmentIds, flash_attention

Extras = frozenset[Literal["kv_lengths", "query_offsets", "sinks", "segment_ids"]]
RAGGED: Extras = frozenset({"kv_lengths"})
PACKED: Extras = frozenset({"segment_ids"})
EVERYTHING: Extras = frozenset({"kv_lengths", "query_offsets", "sinks"})


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
