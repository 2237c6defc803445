"""What an op has to do at least: bytes that must cross the memory bus and useful operations, counted from shapes and lengths.

Masked products are not useful work, padding need not be read, and each key is read once however many queries see it. Knows no op.
"""

from typing import NamedTuple

import numpy as np


class Cost(NamedTuple):
    """Bytes read and written, and operations (a multiply and an add are two)."""

    bytes: int
    operations: int


class Seen(NamedTuple):
    """Keys that at least one query sees, and pairs of a query and a key it sees."""

    keys: int
    pairs: int


def causal(queries: int, first: int, keys: int, window: int | None) -> Seen:
    """What queries at positions first, first + 1, ... see of `keys` keys: those up to their own position, the newest `window` of them."""
    if queries == 0:
        return Seen(0, 0)
    position = np.arange(first, first + queries, dtype=np.int64)
    stop = np.minimum(position + 1, keys)
    begin = np.zeros_like(stop) if window is None else np.clip(position + 1 - window, 0, stop)
    return Seen(int(stop[-1] - begin[0]), int(np.sum(stop - begin)))


def attention(
    seen: Seen, *, queries: int, heads: int, kv_heads: int, head_dim: int, itemsize: int, key_bytes: int | None = None
) -> Cost:
    """Attention of `queries` queries: q and the outputs, the keys and values that are seen; q.k and weights.v for each pair and head.

    key_bytes: of a key of one kv head where it is not head_dim x itemsize, as with quantised ones.
    """
    moved = 2 * queries * heads * head_dim * itemsize + 2 * seen.keys * kv_heads * (key_bytes or head_dim * itemsize)
    return Cost(moved, 4 * seen.pairs * heads * head_dim)


def total(costs: list[Cost]) -> Cost:
    """The sum."""
    return Cost(sum(cost.bytes for cost in costs), sum(cost.operations for cost in costs))
