import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import rope_table, rotate
from pallas_kernels.paged_attention import gpu_write

PAGES, PAGE = 9, 8


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 16])
def test_parts_begin_where_a_copy_may_begin(head_dim, group):
    """At multiples of 128 bytes, none over another."""
    heads = gpu_write.Heads(2, group, head_dim, PAGE)
    taken = set()
    for head in range(2):
        for _, row, count in heads.segments:
            begin = head * heads.pitch + row
            assert begin * heads.half * 2 % gpu_write.ALIGNMENT == 0
            assert not taken & set(range(begin, begin + count))
            taken |= set(range(begin, begin + count))
    assert len(taken) == 2 * (group + 2) and heads.at_once * heads.half % gpu_write.THREADS == 0


@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(2, 4, 128), (1, 3, 64)])
def test_everything_goes_to_its_place(interpreted, kv_heads, group, head_dim):
    """Queries and keys rotated, values as they are; the rest of the pool and what is NOWHERE stay away."""
    tokens, heads, rng = 6, gpu_write.Heads(kv_heads, group, head_dim, PAGE), np.random.default_rng(0)
    qkv = jnp.asarray(rng.standard_normal((tokens, kv_heads * (group + 2), head_dim)), jnp.bfloat16)
    rope = jnp.asarray((10000.0 ** -np.linspace(0, 1, head_dim // 2)).astype(np.float32))
    table = rope_table(jnp.asarray(rng.integers(0, 500, tokens), jnp.int32), rope, 1.0)
    slots = (rng.permutation((PAGES - 1) * PAGE)[:tokens] + PAGE).astype(np.int32)
    lines = (np.arange(tokens) * group).astype(np.int32)
    slots[1], lines[2] = gpu_write.NOWHERE, gpu_write.NOWHERE
    kv = jnp.full((PAGES, kv_heads, 2, PAGE, head_dim), 7, jnp.bfloat16)
    run = jax.jit(lambda *given: gpu_write.rotate_and_write(*given, heads=heads, room=tokens * group + 8))
    placed = run(qkv, gpu_write.waves(table, heads), jnp.asarray(slots), jnp.asarray(lines), kv)
    shape = (tokens, kv_heads, group + 2, head_dim)
    plain, turned = np.asarray(qkv, np.float32).reshape(shape), np.asarray(rotate(qkv, table), np.float32).reshape(shape)
    wanted = np.full(kv.shape, 7, np.float32)
    for token, slot in enumerate(slots):
        if slot >= 0:
            wanted[slot // PAGE, :, 0, slot % PAGE] = turned[token, :, group]
            wanted[slot // PAGE, :, 1, slot % PAGE] = plain[token, :, group + 1]
    np.testing.assert_allclose(np.asarray(placed.kv, np.float32), wanted, rtol=2**-7)
    found = np.asarray(placed.q, np.float32)
    for token, line in enumerate(lines):
        if line >= 0:
            np.testing.assert_allclose(found[:, line : line + group], turned[token, :, :group], rtol=2**-7, atol=1e-6)


def test_outputs_find_back(interpreted):
    rng = np.random.default_rng(0)
    lines = jnp.asarray(rng.standard_normal((2, 12, 64)), jnp.bfloat16)
    line = jnp.asarray([0, 9, gpu_write.NOWHERE, 3], jnp.int32)
    out = np.asarray(jax.jit(lambda lines, line: gpu_write.collect(lines, line, first=1, group=3))(lines, line))
    assert out.shape == (3, 2, 3, 64) and not out[1].any()
    np.testing.assert_array_equal(out[0], np.asarray(lines)[:, 9:12])
    np.testing.assert_array_equal(out[2], np.asarray(lines)[:, 3:6])
