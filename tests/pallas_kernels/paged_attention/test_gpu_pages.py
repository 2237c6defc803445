import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.gpu_pages import Pages


@pytest.mark.parametrize(("page_size", "keys"), [(8, 64), (16, 128), (64, 64), (128, 64), (256, 128)])
def test_blocks_are_where_their_keys_are(page_size, keys):
    """The pieces' rows, key after key, are those of the row's pages."""
    rows, width, heads = 2, 8 * max(128 // page_size, 1), 3
    tables = np.random.default_rng(0).permutation(rows * width).astype(np.int32)
    pages = Pages(heads, page_size, width)
    assert pages.piece(keys) * pages.pieces(keys) == keys
    for row, head, block in ((0, 0, 0), (1, 2, 1), (1, 0, width * page_size // keys - 1)):
        wanted = [
            (tables[row * width + key // page_size] * heads + head) * 2 * page_size + key % page_size
            for key in range(block * keys, (block + 1) * keys)
        ]
        at = pages.at(jnp.asarray(tables), *(jnp.int32(x) for x in (row, head, block)), keys)
        assert len(at) == pages.pieces(keys)
        assert [int(begin) + i for begin in at for i in range(pages.piece(keys))] == wanted
