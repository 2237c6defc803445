"""Ids of pages laid out for launches, and edits of a quantised pool; what the programs do with plain ones is tested in test_program.py."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.sharding import DEFAULT_RULES, ArraySpec, make_mesh
from jaxinfer.step.pages import AT_ONCE, PageEdit, blocks
from pallas_kernels import QuantizedKV


def test_codes_and_scales_are_edited_together():
    codes = ArraySpec((8, 2, 3), np.dtype(np.int8), ("pages", "kv_heads", None))
    layer = QuantizedKV(codes, ArraySpec((8, 2), np.dtype(np.float32), ("pages", "kv_heads")))
    edit = PageEdit((layer,), make_mesh({"data": 2, "tensor": 2}), DEFAULT_RULES)
    kv = (QuantizedKV(jnp.arange(48).astype(jnp.int8).reshape(8, 2, 3), jnp.arange(16.0).reshape(8, 2)),)
    pages = [jnp.array([[1], [page]], jnp.int32) for page in (1, 3)]
    (copied,) = jax.jit(edit.copy)(kv, *pages)
    for before, after in zip(kv[0], copied, strict=True):
        assert np.array_equal(after[7], before[5]) and np.array_equal(after[:7], before[:7])
    (wiped,) = jax.jit(edit.wipe)(kv, pages[1])
    for before, after in zip(kv[0], wiped, strict=True):
        assert not np.asarray(after)[[1, 7]].any() and np.array_equal(np.asarray(after)[2:7], np.asarray(before)[2:7])


def test_each_replica_fills_its_own_line():
    ((sources, targets),) = blocks([(0, 1, 2), (1, 3, 4), (0, 5, 6)], replicas=2, columns=2)
    assert sources.shape == targets.shape == (2, AT_ONCE)
    np.testing.assert_array_equal(sources[:, :3], [[1, 5, 0], [3, 0, 0]])
    np.testing.assert_array_equal(targets[:, :3], [[2, 6, 0], [4, 0, 0]])
    assert not sources[:, 3:].any()


def test_more_than_fit_take_more_launches():
    launches = blocks([(0, page) for page in range(1, AT_ONCE + 3)], replicas=1, columns=1)
    assert [int((ids > 0).sum()) for (ids,) in launches] == [AT_ONCE, 2]
    assert blocks([], replicas=3, columns=2) == []
