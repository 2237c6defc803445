import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import AttentionSpec
from pallas_kernels.paged_attention import gpu_decode
from pallas_kernels.paged_attention.gpu import cut_rows
from pallas_kernels.paged_attention.gpu_pages import Pages
from pallas_kernels.paged_attention.gpu_plan import Plan

DIM, HEADS, WIDTH = 64, 2, 16


@pytest.mark.parametrize(("page_size", "window", "soft_cap"), [(64, None, None), (16, 90, 4.0)])
def test_every_item_alone(interpreted, page_size, window, soft_cap):
    """Output and logarithm of the sum of each chunk, in float64; what belongs to no row is NaN."""
    rng = np.random.default_rng(1)
    width, stop = WIDTH * 16 // page_size, np.array([0, 1, 256, 150], np.int32)
    rows = len(stop)
    tables = 1 + rng.permutation(rows * width).reshape(rows, width)
    known = np.zeros((rows * width + 1, page_size), bool)
    known[tables] = np.arange(width * page_size).reshape(1, width, page_size) < stop[:, None, None]
    kv = rng.standard_normal((rows * width + 1, HEADS, 2, page_size, DIM), np.float32)
    kv = jnp.asarray(np.where(known[:, None, None, :, None], kv, np.float32(np.nan)), jnp.bfloat16)
    q = jnp.asarray(rng.standard_normal((rows * HEADS * 8, DIM), np.float32), jnp.bfloat16)
    items = cut_rows(jnp.asarray(stop), jnp.asarray(stop), window=window, wanted=2, longest=128, capacity=width * page_size)
    fields, total = np.asarray(items.fields), int(items.total[0])
    max_chunks = len(fields) // rows
    spec = AttentionSpec(0.2, window=window, soft_cap=soft_cap)
    plan = Plan(spec, Pages(HEADS, page_size, width), max_chunks, 8, 3, 2, 2, group=8)
    by_head = q.reshape(rows, HEADS, 8, DIM).swapaxes(0, 1).reshape(HEADS, -1, DIM)
    args = (by_head, kv.reshape(-1, DIM), jnp.asarray(tables.reshape(-1), jnp.int32), items.fields.reshape(-1), items.total)
    found = jax.jit(lambda *args: gpu_decode.decode(*args, rows=rows, plan=plan))(*args)
    out, sums = (np.asarray(x, np.float64) for x in (found.parts, found.sums))
    assert found.merged is None

    q64, kv64 = np.asarray(q, np.float64).reshape(rows, HEADS, 8, DIM), np.asarray(kv, np.float64)
    assert total == sum(np.asarray(items.counts))
    for row, chunk, first, blocks, length, _ in fields[:total]:
        floor = 0 if window is None else max(0, length - window)
        seen = np.arange(max(first * 64, floor), min((first + blocks) * 64, length))
        for head in range(HEADS):
            keys, values = kv64[tables[row, seen // page_size], head, :, seen % page_size].transpose(1, 0, 2)
            scores = q64[row, head] @ keys.T * 0.2
            scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
            slot = (row * max_chunks + chunk) * HEADS + head
            weights = np.exp(scores)
            np.testing.assert_allclose(out[slot], weights @ values / weights.sum(1, keepdims=True), atol=0.03)
            np.testing.assert_allclose(sums[slot], np.log2(weights.sum(1)), atol=0.01)
