import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.gpu_combine import combine

COUNTS = np.array([7, 1, 0], np.int32)


@pytest.mark.parametrize(("head_dim", "group", "has_sinks"), [(128, 4, False), (64, 3, True), (96, 9, False)])
def test_a_row_is_the_sum_of_its_chunks(interpreted, head_dim, group, has_sinks):
    rng, (rows, kv_heads, max_chunks, padded) = np.random.default_rng(0), (3, 2, 7, -(-group // 8) * 8)
    parts = rng.standard_normal((rows, max_chunks, kv_heads, padded, head_dim), np.float32)
    sums = rng.standard_normal(parts.shape[:-1], np.float32) * 3
    unused = np.arange(max_chunks)[None] >= COUNTS[:, None]
    parts[unused] = sums[unused] = np.nan
    parts = jnp.asarray(parts, jnp.bfloat16)
    sinks = rng.standard_normal(kv_heads * group, np.float32)
    given = jnp.asarray(sinks) if has_sinks else None
    flat = parts.reshape(-1, padded, head_dim), jnp.asarray(sums.reshape(-1, padded)), jnp.asarray(COUNTS)
    found = np.asarray(combine(*flat, given, kv_heads=kv_heads, group=group), np.float64).reshape(rows, kv_heads, padded, head_dim)

    for row, count in enumerate(COUNTS):
        weights = 2.0 ** sums[row, :count, :, :group]
        total = weights.sum(0) + (np.exp(sinks.reshape(kv_heads, group)) if has_sinks else 0)
        values = np.asarray(parts[row, :count, :, :group], np.float64)
        wanted = (weights[..., None] * values).sum(0) / np.where(total > 0, total, 1)[..., None]
        np.testing.assert_allclose(found[row, :, :group], wanted, atol=0.02)
