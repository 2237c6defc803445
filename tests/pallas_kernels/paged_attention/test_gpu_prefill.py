import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper, hopper_tiles
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.hopper import HEAD_DIMS
from pallas_kernels.paged_attention import gpu_prefill
from pallas_kernels.paged_attention.gpu import heuristic
from pallas_kernels.paged_attention.gpu_pages import Pages

DIM, HEADS, WIDTH, PAGE = 64, 2, 16, 16


def test_shared_memory_suffices():
    for head_dim in HEAD_DIMS:
        sizes = heuristic("gpu", {"head_dim": head_dim})
        assert hopper_tiles.shared_bytes(head_dim, sizes["prefill_keys"], sizes["prefill_stages"]) <= hopper.SHARED_BYTES


@pytest.mark.parametrize(("group", "keys", "window", "has_sinks"), [(3, 128, None, True), (8, 64, 120, False)])
def test_every_tile_alone(interpreted, group, keys, window, has_sinks):
    """Tiles at shuffled places, the last one's place never written; what belongs to no row is NaN."""
    rng = np.random.default_rng(2)
    own, source = gpu_prefill.Queries(group), gpu_prefill.Keys(Pages(HEADS, PAGE, WIDTH))
    plan = hopper_tiles.Plan(AttentionSpec(0.2, window=window), own, source, HEADS, keys, 2, 2)
    room = hopper_tiles.CONSUMERS * own.tokens
    stop = np.array([200, 1], np.int32)  # the first row's queries: all that fit a tile, and 5
    tiles = np.array([[2, 0, 195 - room, room, 200], [0, 0, 195, 5, 200], [1, 1, 0, 1, 1], [3, 0, 0, 0, 0]], np.int32)
    tables = 1 + rng.permutation(2 * WIDTH).reshape(2, WIDTH)
    known = np.zeros((2 * WIDTH + 1, PAGE), bool)
    known[tables] = np.arange(WIDTH * PAGE).reshape(1, WIDTH, PAGE) < stop[:, None, None]
    kv = rng.standard_normal((2 * WIDTH + 1, HEADS, 2, PAGE, DIM), np.float32)
    kv = jnp.asarray(np.where(known[:, None, None, :, None], kv, np.float32(np.nan)), jnp.float16)
    q = jnp.asarray(rng.standard_normal((HEADS, 4 * hopper_tiles.LINES, DIM), np.float32), jnp.float16)
    sinks = rng.standard_normal((HEADS, hopper.TILE), np.float32)
    pool = (kv.reshape(-1, DIM), jnp.asarray(tables.reshape(-1), jnp.int32))
    given = jnp.asarray(sinks) if has_sinks else None
    inputs = hopper_tiles.Inputs(q, pool, jnp.asarray(tiles.reshape(-1)), jnp.asarray([3], jnp.int32), given)
    found = np.asarray(jax.jit(lambda inputs: hopper_tiles.attend(inputs, head_dim=DIM, plan=plan))(inputs), np.float64)

    q64, kv64 = np.asarray(q, np.float64), np.asarray(kv, np.float64)
    for place, row, first, tokens, _ in tiles[:3]:
        for token in range(tokens):
            position = first + token
            seen = np.arange(0 if window is None else max(0, position + 1 - window), position + 1)
            at = token % own.tokens * group
            line = place * hopper_tiles.LINES + token // own.tokens * hopper.TILE + at
            for head in range(HEADS):
                k, values = kv64[tables[row, seen // PAGE], head, :, seen % PAGE].transpose(1, 0, 2)
                weights = np.exp(q64[head, line : line + group] @ k.T * 0.2)
                total = weights.sum(1, keepdims=True) + (np.exp(sinks[head, at : at + group])[:, None] if has_sinks else 0)
                np.testing.assert_allclose(found[head, line : line + group], weights @ values / total, atol=4e-3)
