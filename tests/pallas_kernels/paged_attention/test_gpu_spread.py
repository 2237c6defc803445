import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import rope_table, rotate
from pallas_kernels.paged_attention import gpu_spread, gpu_write
from pallas_kernels.paged_attention.pool import SMALLEST, QuantizedKV, quantize

PAGES, PAGE, TOKENS = 5, 32, 5
SLOTS = np.array([PAGE, gpu_write.NOWHERE, 3 * PAGE - 1, 3 * PAGE, 4 * PAGE + 7], np.int32)  # a page's first place and its last


def longer(*shapes):
    return [pytest.param(*shape, marks=(pytest.mark.ci, pytest.mark.interpreter)) for shape in shapes]


def step(kv_heads, group, head_dim):
    """Projections of some tokens, a table of waves, and where the tokens' queries go: one of them nowhere."""
    rng = np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((TOKENS, kv_heads, group + 2, head_dim)), jnp.bfloat16)
    rope = jnp.asarray((10000.0 ** -np.linspace(0, 1, head_dim // 2)).astype(np.float32))
    table = rope_table(jnp.asarray(rng.integers(0, 500, TOKENS), jnp.int32), rope, 1.0)
    lines = np.arange(TOKENS, dtype=np.int32) * group
    lines[2] = gpu_write.NOWHERE
    return qkv, table, lines


def placed(way, qkv, table, lines, kv):
    _, kv_heads, rows, head_dim = qkv.shape
    waves = gpu_write.waves(table, gpu_write.Heads(kv_heads, rows - 2, head_dim, PAGE))
    run = jax.jit(lambda *given: way.rotate_and_write(*given, room=TOKENS * (rows - 2) + 8))
    return run(qkv, waves, jnp.asarray(SLOTS), jnp.asarray(lines), kv)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 16])
def test_pieces_fill_the_threads_and_leave_nothing_out(head_dim, group):
    heads = gpu_spread.Heads(8, group, head_dim)
    for first, count in ((0, group), (group, 2)):
        covered = set()
        for piece in heads.pieces(first, count):
            assert piece.heads * piece.rows * heads.half % gpu_spread.THREADS == 0
            rows = range(piece.row, piece.row + piece.rows)
            covered |= set(itertools.product(range(piece.head, piece.head + piece.heads), rows))
        assert covered == set(itertools.product(range(heads.dealt), range(first, first + count)))
    assert heads.blocks * heads.dealt >= 8 and heads._replace(kv_heads=heads.dealt - 1).blocks == 0


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"),
    [(3, 3, 64), *longer((2, 4, 128), (1, 4, 128), (4, 1, 64), (5, 16, 96), (8, 1, 96), (2, 1, 128), (1, 3, 256), (2, 16, 256))],
)
def test_numbers_are_those_of_the_other_way(interpreted, kv_heads, group, head_dim):
    """On a card bit for bit (the interpreter's compiler contracts sums as it likes), and what is NOWHERE stays away."""
    qkv, table, lines = step(kv_heads, group, head_dim)
    kv = jnp.full((PAGES, kv_heads, 2, PAGE, head_dim), 7, jnp.bfloat16)
    found, wanted = (placed(way, qkv, table, lines, kv) for way in (gpu_spread, gpu_write))
    close = partial(np.testing.assert_allclose, rtol=2**-8, atol=4e-6)
    close(np.asarray(found.kv, np.float32), np.asarray(wanted.kv, np.float32))
    assert (np.asarray(found.kv, np.float32) != 7).any(axis=-1).sum() == 2 * kv_heads * (TOKENS - 1)
    for line in lines[lines >= 0]:
        mine = slice(line, line + group)
        close(np.asarray(found.q, np.float32)[:, mine], np.asarray(wanted.q, np.float32)[:, mine])


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "group", "head_dim"),
    [(jnp.int8, 2, 4, 64), *longer((jnp.int8, 1, 4, 128), (jnp.float8_e4m3fn, 5, 3, 96), (jnp.float8_e4m3fn, 4, 1, 64))],
)
def test_codes_are_those_of_the_pool(interpreted, dtype, kv_heads, group, head_dim):
    """But for a number between two codes; zeros have the smallest scale, and a NaN makes its own vector NaN."""
    qkv, table, lines = step(kv_heads, group, head_dim)
    qkv = qkv.at[3, 0, group + 1].set(0)
    sizes = (PAGES, kv_heads, 2, PAGE)
    kv = QuantizedKV(jnp.full((*sizes, head_dim), 7, dtype), jnp.full(sizes, 7, jnp.float32))
    found = placed(gpu_spread, qkv.at[4, 0, group, 5].set(jnp.nan), table, lines, kv).kv
    wide = qkv.astype(jnp.float32)
    new = quantize(jnp.stack([rotate(wide[:, :, group], table), wide[:, :, group + 1]], axis=2), dtype)
    codes, scales = np.array(kv.values, np.float32), np.array(kv.scales)
    for token in np.flatnonzero(SLOTS >= 0):
        place = SLOTS[token] // PAGE, slice(None), slice(None), SLOTS[token] % PAGE
        codes[place], scales[place] = np.asarray(new.values, np.float32)[token], np.asarray(new.scales)[token]
    real = ~np.isnan(np.asarray(found.scales))
    assert np.argwhere(~real).tolist() == [[4, 0, 0, 7]] and found.scales[3, 0, 1, 0] == np.float32(SMALLEST)
    np.testing.assert_allclose(np.asarray(found.scales)[real], scales[real], rtol=1e-6)
    assert np.mean(np.asarray(found.values, np.float32)[real] != codes[real]) < 2e-3
