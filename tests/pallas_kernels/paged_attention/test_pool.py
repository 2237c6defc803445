import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import pool
from pallas_kernels.paged_attention.pool import QuantizedKV


@pytest.mark.parametrize(("dtype", "half_step"), [("int8", 0.5 / 127), ("float8_e4m3fn", 2.0**-4)])
def test_numbers_come_back_within_half_a_step(dtype, half_step):
    x = np.random.default_rng(0).standard_normal((5, 3, 64)).astype(np.float32) * np.logspace(-20, 4, 5, dtype=np.float32)[:, None, None]
    found = pool.quantize(jnp.asarray(x), dtype)
    assert found.values.dtype == dtype and found.scales.dtype == jnp.float32 and found.scales.shape == (5, 3)
    largest = np.abs(x).max(-1, keepdims=True)
    codes = np.abs(np.asarray(found.values, np.float32))
    np.testing.assert_array_equal(codes.max(-1), pool.LARGEST[dtype])
    back = np.asarray(pool.dequantize(found, jnp.float32))
    assert (np.abs(back - x) <= (half_step * 1.001) * (largest if dtype == "int8" else np.maximum(np.abs(x), largest * 2.0**-14))).all()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_zeros_stay_and_broken_vectors_are_broken(dtype):
    x = jnp.asarray([[0.0, 0, 0], [1, jnp.nan, 2], [1, jnp.inf, 0]], jnp.bfloat16)
    back = np.asarray(pool.dequantize(pool.quantize(x, dtype), jnp.float32))
    assert (back[0] == 0).all()
    assert np.isnan(back[1]).all()
    assert not np.isfinite(back[2]).any()


def test_layouts_have_the_pools_structure():
    plain, quantized = (pool.by_head(kv_heads=2, head_dim=8, dtype=jnp.bfloat16, kv_dtype=codes) for codes in (None, "int8"))
    assert isinstance(plain, pool.KVLayout) and plain.dtype == jnp.bfloat16
    made = jax.tree.map(lambda array: jnp.zeros(array.shape(5, 4), array.dtype), quantized)
    assert isinstance(made, QuantizedKV) and made.values.shape == (5, 2, 2, 4, 8) and made.scales.shape == (5, 2, 2, 4)
    assert (pool.code_dtype(made), pool.code_dtype(made.values)) == ("int8", None)
    assert pool.values_of(made) is made.values and pool.values_of(plain) is plain
