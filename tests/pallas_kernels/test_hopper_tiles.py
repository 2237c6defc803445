import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper_tiles
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.hopper_tiles import Plan, Tile


class Tokens:
    """Queries, as far as ranges of blocks need them."""

    tokens = 16


@pytest.mark.parametrize("window", [None, 1, 40, 300])
def test_blocks_without_a_mask_are_seen_whole(window):
    """The ranges are the tile's blocks in order, once each, and what is not masked every query of the warpgroup sees."""
    keys, rng = 64, np.random.default_rng(0)
    plan = Plan(AttentionSpec(1.0, window=window), Tokens(), None, 1, keys, 2, 1)
    for _ in range(40):
        first, stop = int(rng.integers(0, 700)), int(rng.integers(0, 700))
        begin = 0 if window is None else max(first - (window - 1), 0) // keys
        end = max(begin, -(-min(first + 2 * Tokens.tokens, stop) // keys))
        tile = Tile(0, 0, 0, 0, first, *(jnp.int32(x) for x in (begin, end, stop)))
        for mine in (first, first + Tokens.tokens):
            found = [(int(a), int(b), masked) for a, b, masked in hopper_tiles._ranges(plan, tile, jnp.int32(mine), has_ids=False)]
            assert [block for a, b, _ in found for block in range(a, b)] == list(range(begin, end))
            for a, b, masked in found:
                assert masked or a >= b or (b * keys <= min(stop, mine + 1) and (window is None or a * keys > mine + 15 - window))
            assert hopper_tiles._ranges(plan, tile, jnp.int32(mine), has_ids=True) == [(tile.begin, tile.end, True)]


def test_shared_memory_counts_queries_keys_values_and_ids():
    assert hopper_tiles.shared_bytes(128, 128, 2) == 2 * 128 * (128 + 4 * 128) + 4 * 2 * 128 + 8 * 13
    more = hopper_tiles.shared_bytes(128, 128, 2, slots=2) - hopper_tiles.shared_bytes(128, 128, 2)
    assert more == 2 * 128 * 128 + 8 * 4  # queries of one more tile and their barriers
