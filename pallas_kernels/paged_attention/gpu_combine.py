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
    """Static shape: query heads of one warpgroup side by side, so many that their features fill its threads."""

    kv_heads: int
    group: int
    padded: int
    head_dim: int
    max_chunks: int
    heads: int

    @property
    def features(self) -> int:
        """Numbers that one warpgroup merges."""
        return self.heads * self.head_dim

    @property
    def layout(self) -> Any:
        """How they are spread over its threads."""
        return plgpu.Layout.WG_STRIDED((self.features,), vec_size=self.features // 128)

    def pick(self, values: list[Any]) -> Any:
        """Each head's number, along its features."""
        feature = plgpu.broadcasted_iota(jnp.int32, (self.features,), 0, layout=self.layout)
        out = jnp.full((self.features,), 0, jnp.float32) + values[-1]
        for head in reversed(range(self.heads - 1)):
            out = jnp.where(feature < (head + 1) * self.head_dim, values[head], out)
        return out


def combine(
    parts: Float[Array, "slots padded head_dim"],
    sums: Float[Array, "slots padded"],
    counts: Int32[Array, "rows"],
    sinks: Float[Array, "heads"] | None,
    *,
    kv_heads: int,
    group: int,
) -> Float[Array, "rows_kv_heads padded head_dim"]:
    """What `gpu_decode.decode` left, merged: the first counts[row] chunks of each row; 0 for a row without any."""
    slots, padded, head_dim = parts.shape
    rows, heads = counts.shape[0], 1
    while heads * head_dim % 128:
        heads *= 2
    merge = Merge(kv_heads, group, padded, head_dim, slots // (rows * kv_heads), heads)
    given = jnp.zeros((1,), jnp.float32) if sinks is None else sinks.astype(jnp.float32) * LOG2E
    out = plgpu.kernel(
        lambda *refs: _body(merge, *refs, has_sinks=sinks is not None),
        out_type=jax.ShapeDtypeStruct((rows * kv_heads, padded * head_dim), parts.dtype),
        grid=(rows, kv_heads, -(-group // heads)),
        grid_names=("row", "head", "part"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=hopper.interpretation(),
    )(parts.reshape(slots, -1), sums.reshape(-1), counts, given)
    return out.reshape(-1, padded, head_dim)


def _body(merge: Merge, parts: Any, sums: Any, counts: Any, sinks: Any, out: Any, *, has_sinks: bool) -> None:
    row, head, part = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("part")
    count, first = counts[row], part * merge.heads
    features = pl.ds(first * merge.head_dim, merge.features)

    def some(step: Any, carry: Any) -> Any:
        merged, tops, totals = carry
        chunks = [step * AT_ONCE + number for number in range(AT_ONCE)]
        slots = [(row * merge.max_chunks + jnp.minimum(chunk, count - 1)) * merge.kv_heads + head for chunk in chunks]
        found = [hopper.load(parts.at[slot, features], merge.layout).astype(jnp.float32) for slot in slots]
        updates = []
        for index in range(merge.heads):
            logs = [sums[slot * merge.padded + first + index] for slot in slots]
            logs = [jnp.where(chunk < count, log, -jnp.inf) for chunk, log in zip(chunks, logs, strict=True)]
            updates.append(_update(tops[index], totals[index], logs))
        new_tops, new_totals, decays, shares = zip(*updates, strict=True)
        merged = merged * merge.pick(list(decays))
        for number, values in enumerate(found):
            merged = merged + merge.pick([share[number] for share in shares]) * values
        return merged, new_tops, new_totals

    if has_sinks:
        start = tuple(sinks[head * merge.group + jnp.minimum(first + index, merge.group - 1)] for index in range(merge.heads))
    else:
        start = (jnp.float32(LOWEST),) * merge.heads
    zeros = plgpu.layout_cast(jnp.full((merge.features,), 0, jnp.float32), merge.layout)
    carry = (zeros, start, (jnp.float32(1 if has_sinks else 0),) * merge.heads)
    merged, _, totals = lax.fori_loop(0, lax.div(count + (AT_ONCE - 1), jnp.int32(AT_ONCE)), some, carry)
    merged = merged / merge.pick([jnp.where(total > 0, total, 1.0) for total in totals])
    out[row * merge.kv_heads + head, features] = merged.astype(out.dtype)


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
