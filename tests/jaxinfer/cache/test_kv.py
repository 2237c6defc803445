"""The pool's size and arrays: one per layer, sharded by replica and KV head."""

import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.kv import PoolShape, allocate
from jaxinfer.sharding import DEFAULT_RULES, ArraySpec, make_mesh
from pallas_kernels import QuantizedKV


def test_a_quantised_pool_is_two_arrays():
    codes = ArraySpec((6, 2, 4), np.dtype(np.int8), ("pages", "kv_heads", None))
    layer = QuantizedKV(codes, ArraySpec((6, 2), np.dtype(np.float32), ("pages", "kv_heads")))
    (pool,) = allocate([layer], make_mesh({"tensor": 2}), DEFAULT_RULES)
    assert isinstance(pool, QuantizedKV) and pool.values.dtype == jnp.int8
    assert {shard.data.shape for shard in pool.scales.addressable_shards} == {(6, 1)}


def test_sizes_leave_the_guard_pages_out():
    shape = PoolShape(pages=9, page_size=4, replicas=2)
    assert shape.all_pages == 18
    assert shape.tokens == 64


def test_pages_go_to_replicas_and_heads_to_shards():
    specs = [ArraySpec((18, 2, 4), np.dtype(jnp.bfloat16), ("pages", "kv_heads", None))] * 3
    pool = allocate(specs, make_mesh({"data": 2, "tensor": 2}), DEFAULT_RULES)
    assert len(pool) == 3
    for layer in pool:
        assert layer.shape == (18, 2, 4)
        assert layer.dtype == jnp.bfloat16
        assert {shard.data.shape for shard in layer.addressable_shards} == {(9, 1, 4)}
        assert not np.asarray(layer).any()
    assert len({layer.unsafe_buffer_pointer() for layer in (pool_layer.addressable_shards[0].data for pool_layer in pool)}) == 3
