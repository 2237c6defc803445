from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.paged_attention import pool, tpu_write
from pallas_kernels.paged_attention.tpu_plan import Rows


def test_pieces_are_the_pages_that_tokens_touch():
    lengths, positions = np.array([5, 0, 9, 1]), np.array([6, 0, 0, 15])
    starts = np.array([0, 5, 5, 14])
    tables = jnp.asarray(np.arange(1, 17, dtype=np.int32).reshape(4, 4))
    rows = Rows(*(jnp.asarray(x.astype(np.int32)) for x in (starts, lengths, positions, positions + lengths)))
    work = jax.jit(partial(tpu_write.pieces, tokens=16, page_size=8))(rows, tables)
    total = int(work.total[0])
    fields = np.asarray(work.fields).reshape(-1, 3)[:total]
    assert fields.tolist() == [[1, 6, 8], [2, 0, 3], [9, 0, 8], [10, 0, 1], [14, 7, 8]]
    for number, wanted in enumerate(([0, 1], [2, 3, 4], [5, 6, 7, 8, 9, 10, 11, 12], [13], [14])):
        _, begin, end = fields[number]
        assert np.asarray(work.tokens)[number, begin:end].tolist() == wanted
    assert work.tokens.shape[0] >= total


def test_laid_and_written(simulated):
    rng = np.random.default_rng(0)
    layout = pool.side_by_side(kv_heads=2, head_dim=64, dtype=jnp.float32, kv_dtype=None)
    k, v = (jnp.asarray(rng.standard_normal((12, 2, 64), np.float32)) for _ in range(2))
    kv = jnp.asarray(rng.standard_normal(layout.shape(7, 8), np.float32))
    one = lambda *numbers: jnp.asarray(numbers, jnp.int32)
    rows = Rows(one(0, 10), one(10, 2), one(3, 6), one(13, 8))

    @jax.jit
    def write(k, v, kv):
        work = tpu_write.pieces(rows, one(1, 2, 3, 4).reshape(2, 2), tokens=12, page_size=8)
        return tpu_write.write(tpu_write.laid(k, v, kv, work.tokens), kv, work)

    found = layout.by_head(np.asarray(write(k, v, kv)))
    wanted = layout.by_head(np.asarray(kv)).copy()
    for token in range(12):
        position = 3 + token if token < 10 else 6 + token - 10
        page = (1 + position // 8) if token < 10 else 3
        wanted[page, :, 0, position % 8], wanted[page, :, 1, position % 8] = k[token], v[token]
    assert np.array_equal(found, wanted)
