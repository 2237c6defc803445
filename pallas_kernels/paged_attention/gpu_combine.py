"""A decode row's output from its chunks' outputs, for Hopper: one warpgroup per row, kv head and a few query heads.

The chunks are merged in order with weights exp2(sum - largest sum), some at a time so that their loads overlap (Flash-Decoding). A sink
is where the running sum starts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels import hopper
from pallas_kernels.attention import LOWEST
from pallas_kernels.hopper import LOG2E

AT_ONCE = 4  # chunks whose loads overlap


class Merge(NamedTuple):
    """Static shape: query heads of one warpgroup side by side (`heads`, in `parts` turns), so many that their features fill its threads."""

    kv_heads: int
    group: int
    head_dim: int
    max_chunks: int
    heads: int

    @classmethod
    def of(cls, *, kv_heads: int, group: int, head_dim: int, max_chunks: int) -> "Merge":
        """For a group of query heads."""
        heads = 1
        while heads * head_dim % 128 or heads < min(group, 8):
            heads *= 2
        return cls(kv_heads, group, head_dim, max_chunks, heads)

    @property
    def parts(self) -> int:
        """How often a warpgroup merges for one kv head."""
        return -(-self.group // self.heads)

    def out(self, rows: int, dtype: Any) -> jax.ShapeDtypeStruct:
        """What comes out for so many rows; lines behind the group hold anything."""
        return jax.ShapeDtypeStruct((rows * self.kv_heads, self.parts * self.heads, self.head_dim), dtype)

    @property
    def layout(self) -> Any:
        """How a turn's numbers [heads, head_dim] are spread over the threads."""
        return plgpu.Layout.WG_STRIDED((self.heads, self.head_dim), vec_size=self.heads * self.head_dim // 128)

    def zeros(self) -> Any:
        """As many as a turn has."""
        return plgpu.layout_cast(jnp.full((self.heads, self.head_dim), 0, jnp.float32), self.layout)

    def pick(self, values: list[Any]) -> Any:
        """Each head's number, along its features."""
        head = plgpu.broadcasted_iota(jnp.int32, (self.heads, self.head_dim), 0, layout=self.layout)
        out = self.zeros() + values[-1]
        for index in reversed(range(self.heads - 1)):
            out = jnp.where(head <= index, values[index], out)
        return out


def combine(
    parts: Float[Array, "slots padded head_dim"],
    sums: Float[Array, "slots padded"],
    counts: Int32[Array, "rows"],
    sinks: Float[Array, "heads"] | None,
    *,
    kv_heads: int,
    group: int,
) -> Float[Array, "rows_kv_heads group_or_more head_dim"]:
    """What `gpu_decode.decode` left, merged: the first counts[row] chunks of each row; 0 for a row without any."""
    slots, _, head_dim = parts.shape
    rows = counts.shape[0]
    merge = Merge.of(kv_heads=kv_heads, group=group, head_dim=head_dim, max_chunks=slots // (rows * kv_heads))
    without = sinks is None
    given = jnp.zeros((1,), jnp.float32) if sinks is None else sinks.astype(jnp.float32) * LOG2E

    def body(parts: Any, sums: Any, counts: Any, sinks: Any, out: Any) -> None:
        row, head, part = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("part")
        merge_row(merge, Places(parts, sums, out), row, head, part, counts[row], None if without else sinks)

    return plgpu.kernel(
        hopper.named(body, __name__),
        out_type=merge.out(rows, parts.dtype),
        grid=(rows, kv_heads, merge.parts),
        grid_names=("row", "head", "part"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=hopper.interpretation(),
    )(parts, sums, counts, given)


class Places(NamedTuple):
    """Memory: what chunks left, and what is made of it."""

    parts: Any
    sums: Any
    out: Any


def merge_row(merge: Merge, places: Places, row: Any, head: Any, part: Any, count: Any, sinks: Any = None) -> None:
    """Merge `count` chunks of a row for a kv head, its `part`th turn. By one warpgroup."""
    first = part * merge.heads

    def some(step: Any, carry: Any) -> Any:
        merged, tops, totals = carry
        chunks = [step * AT_ONCE + number for number in range(AT_ONCE)]
        slots = [(row * merge.max_chunks + jnp.minimum(chunk, count - 1)) * merge.kv_heads + head for chunk in chunks]
        found = [hopper.load(places.parts.at[slot, pl.ds(first, merge.heads)], merge.layout).astype(jnp.float32) for slot in slots]
        updates = []
        for index in range(merge.heads):
            logs = [places.sums[slot, first + index] for slot in slots]
            logs = [jnp.where(chunk < count, log, -jnp.inf) for chunk, log in zip(chunks, logs, strict=True)]
            updates.append(_update(tops[index], totals[index], logs))
        new_tops, new_totals, decays, shares = zip(*updates, strict=True)
        merged = merged * merge.pick(list(decays))
        for number, values in enumerate(found):
            merged = merged + merge.pick([share[number] for share in shares]) * values
        return merged, new_tops, new_totals

    if sinks is None:
        start = (jnp.float32(LOWEST),) * merge.heads
    else:
        start = tuple(sinks[head * merge.group + jnp.minimum(first + index, merge.group - 1)] for index in range(merge.heads))
    carry = (merge.zeros(), start, (jnp.float32(0 if sinks is None else 1),) * merge.heads)
    merged, _, totals = lax.fori_loop(0, lax.div(count + (AT_ONCE - 1), jnp.int32(AT_ONCE)), some, carry)
    merged = merged / merge.pick([jnp.where(total > 0, total, 1.0) for total in totals])
    places.out[row * merge.kv_heads + head, pl.ds(first, merge.heads)] = merged.astype(places.out.dtype)


def _update(top: Any, total: Any, logs: list[Any]) -> tuple[Any, Any, Any, list[Any]]:
    """One head's largest sum and total with more chunks in it, the decay of what was merged before, and the chunks' shares."""
    new_top = top
    for log in logs:
        new_top = jnp.maximum(new_top, log)
    decay, shares = jnp.exp2(top - new_top), [jnp.exp2(log - new_top) for log in logs]
    new_total = total * decay
    for share in shares:
        new_total = new_total + share
    return new_top, new_total, decay, shares
