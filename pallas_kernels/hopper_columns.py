"""The online softmax of few queries on a Hopper GPU: keys and values on the left of the products, each query a column.

wgmma multiplies 64 rows at least. With keys as the rows, scores are [keys, queries] and the weighted values [head_dim, queries]: as many
numbers as there are queries (a multiple of 8), where queries as the rows would be filled up to 64. Scores are kept in base 2. The weights
go through shared memory, since the right side of a product must lie there. Knows no pages and no rows.
Source: FlashAttention-2 (arXiv 2307.08691).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.attention import LOWEST
from pallas_kernels.hopper import ACC, COLUMNS, TILE, WHOLE

EXCHANGE = 4 * 32 * 2  # float32 that a maximum over keys needs in shared memory: two of each thread


class State(NamedTuple):
    """Of a tile of queries so far: values weighted, largest score, and the weights' sums, each key of a block its own."""

    weighted: tuple[Any, ...]  # [features, queries] float32, for each of `features`
    top: Any  # [queries]
    total: Any  # [keys, queries]


class Room(NamedTuple):
    """Shared memory of one warpgroup: weights [queries, keys] in the dtype of the values, EXCHANGE numbers for a maximum."""

    weights: Any
    exchange: Any

    @classmethod
    def scratch(cls, warpgroups: int, shape: tuple[int, int], dtype: Any, *, head_dim: int) -> "Room":
        """What holds it, once for each of them; shape: queries, keys. wgmma wants both of its sides swizzled alike."""
        weights = hopper.swizzled((warpgroups, *shape), dtype, like=head_dim if head_dim % TILE else None)
        return cls(weights, plgpu.SMEM((warpgroups, EXCHANGE), jnp.float32))

    @classmethod
    def nbytes(cls, queries: int, keys: int) -> int:
        """Bytes of one."""
        return 2 * queries * keys + 4 * EXCHANGE

    def of(self, warpgroup: Any) -> "Room":
        """One warpgroup's."""
        return Room(self.weights.at[warpgroup], self.exchange.at[warpgroup])


def features(head_dim: int) -> list[Any]:
    """A head's features as slices that wgmma takes as rows, multiples of 64: two that overlap where head_dim is none."""
    return [pl.ds(0, head_dim)] if head_dim % TILE == 0 else [pl.ds(0, TILE), pl.ds(head_dim - TILE, TILE)]


def start(head_dim: int, keys: int, queries: int) -> State:
    """The state before any key."""
    return State(
        tuple(plgpu.layout_cast(jnp.full((part.size, queries), 0, jnp.float32), WHOLE) for part in features(head_dim)),
        plgpu.layout_cast(jnp.full((queries,), LOWEST, jnp.float32), COLUMNS),
        plgpu.layout_cast(jnp.full((keys, queries), 0, jnp.float32), WHOLE),
    )


def products(keys: Any, queries: Any, spilled: Any = None) -> Any:
    """keys [keys, head_dim] in shared memory or registers times queries [queries, head_dim] in shared memory: [keys, queries] in float32.

    spilled: memory for keys in registers that the interpreter needs.
    """
    if spilled is not None:
        spilled[...] = keys
        plgpu.commit_smem()
        keys = spilled

    def multiply(accumulator: Any) -> Any:
        plgpu.wgmma(accumulator, keys, queries.transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(multiply, ACC((keys.shape[0], queries.shape[0]), jnp.float32))


def spread(columns: Any, shape: tuple[int, ...]) -> Any:
    """One number per query, for all rows."""
    return lax.broadcast_in_dim(columns, shape, [1])


def weights(state: State, scores: Any, factor: float, room: Room) -> tuple[Any, Any, State]:
    """One block of scores [keys, queries] (-inf where not seen) enters the softmax: its weights, the decay of what there was, the state.

    The state's `weighted` is left to `weigh`.
    """
    top = jnp.maximum(state.top, _over_keys(scores, room, "max") * factor)
    decay = jnp.exp2(state.top - top)
    share = jnp.exp2(scores * factor - spread(top, scores.shape))
    return share, decay, State(state.weighted, top, state.total * spread(decay, scores.shape) + share)


def weigh(state: State, share: Any, decay: Any, values: Any, room: Room) -> State:
    """A block's values [keys, head_dim], in shared memory, times share [keys, queries] are added to what was weighted, which decays."""
    room.weights.transpose((1, 0))[...] = plgpu.layout_cast(share.astype(values.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    parts = zip(state.weighted, features(values.shape[1]), strict=True)
    return state._replace(weighted=tuple(_add(part * spread(decay, part.shape), values.at[:, own], room) for part, own in parts))


def _add(weighted: Any, values: Any, room: Room) -> Any:
    """weighted [features, queries] + values [keys, features], transposed, times the room's weights."""

    def multiply(accumulator: Any) -> Any:
        plgpu.wgmma(accumulator, values.transpose((1, 0)), room.weights.transpose((1, 0)))
        return accumulator[...] if hopper.interpreting() else None

    if hopper.interpreting():
        return weighted + pl.run_scoped(multiply, ACC(weighted.shape, jnp.float32))
    return pl.run_state(multiply)(ACC.init(weighted))


def mean(state: State, total: Any, out: Any) -> None:
    """Weighted values over the sums of their weights into shared memory [queries, head_dim]; `plgpu.commit_smem` has to follow."""
    for part, own in zip(state.weighted, features(out.shape[1]), strict=True):
        found = (part / spread(total, part.shape)).astype(out.dtype)
        out.at[:, own].transpose((1, 0))[...] = plgpu.layout_cast(found, plgpu.Layout.WGMMA_TRANSPOSED)


def total(state: State, room: Room) -> Any:
    """The weights' sums [queries]."""
    return _over_keys(state.total, room, "add")


def _over_keys(values: Any, room: Room, operation: str) -> Any:
    """[keys, queries] to [queries], across the warps of one warpgroup through memory of its own: several may do so at a time."""
    if hopper.interpreting():
        return values.max(axis=0) if operation == "max" else values.sum(axis=0)
    made = plgpu.ShapeDtypeStruct((values.shape[1],), jnp.float32, layout=COLUMNS)

    def reduce(_: Any, values: Any, exchange: Any) -> Any:
        return values.reduce(operation, 0, scratch=exchange)

    return plgpu.inline_mgpu(arg_types=(WHOLE, plgpu.RefType()), return_type=made)(reduce)(values, room.exchange)
