import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tensorcore_softmax import blocks, both_lanes, joined, lines_of_sinks, query_lanes, unblocks, visible


@pytest.mark.parametrize(("head_dim", "shares", "both", "query"), [(64, True, 128, 128), (96, True, 256, 256), (128, False, 256, 128)])
def test_lanes(head_dim, shares, both, query):
    assert (joined(head_dim), both_lanes(head_dim), query_lanes(head_dim)) == (shares, both, query)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_and_back(head_dim):
    q = jnp.asarray(np.random.default_rng(0).standard_normal((21, 6, head_dim), np.float32))
    cut = blocks(q, tokens=4, kv_heads=2, lines=16)
    assert cut.shape == (6, 2, 16, 128)
    assert np.array_equal(cut[1, 1, 4, :head_dim], q[5, 4])  # token 5 is token 1 of block 1; its second head of kv head 1
    assert not np.any(cut[:, :, 12:])
    assert not np.any(cut[..., head_dim:])
    moved = jnp.roll(cut, head_dim, axis=3) if joined(head_dim) else cut  # results lie where the values do
    assert np.array_equal(unblocks(moved, tokens=4, head_dim=head_dim, group=3)[:21], q)


def test_sinks_by_line():
    found = lines_of_sinks(jnp.arange(6, dtype=jnp.float32), tokens=2, kv_heads=2, lines=8)
    assert found.shape == (8, 128)
    assert np.array_equal(found[:6, :2], [[0, 3], [1, 4], [2, 5]] * 2)


@pytest.mark.parametrize("window", [None, 3])
def test_what_is_visible(window):
    key = jnp.arange(4, 12, dtype=jnp.int32)[None, None]
    seen = visible(15, key, position=6, group=3, window=window, between=(1, 4))[0]
    for line in range(15):
        token, position = line // 3, 6 + line // 3
        for index in range(8):
            wanted = 1 <= token < 4 and index + 4 <= position and (window is None or index + 4 > position - window)
            assert seen[line, index] == wanted
