"""Counts of least work, against counting one by one."""

import numpy as np
import pytest

from pallas_kernels import costs


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("queries", "first", "keys"), [(1, 9, 10), (5, 0, 5), (4, 3, 7), (6, 0, 4), (0, 5, 5)])
def test_pairs_are_those_of_the_mask(queries, first, keys, window):
    position, key = np.arange(first, first + queries)[:, None], np.arange(keys)[None]
    seen = (key <= position) & (key > position - (window or 1000))
    assert costs.causal(queries, first, keys, window) == (seen.any(axis=0).sum(), seen.sum())


def test_attention_counts_the_causal_half():
    cost = costs.attention(costs.causal(64, 0, 64, None), queries=64, heads=8, kv_heads=2, head_dim=16, itemsize=2)
    assert cost.bytes == 2 * (2 * 64 * 8 * 16 + 2 * 64 * 2 * 16)
    assert cost.operations == 4 * 16 * 8 * 64 * 65 // 2
    assert costs.total([cost, cost]) == (2 * cost.bytes, 2 * cost.operations)
