import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import xla
from pallas_kernels.grouped_matmul.cases import Case


@pytest.mark.parametrize("weight", ["float", "int8"])
def test_no_rows(weight):
    inputs = Case("x", rows=3, groups=2, features=8, outputs=4, weight=weight).make(0)
    out = xla.grouped_matmul(**(inputs | {"x": inputs["x"][:0], "sizes": jnp.zeros(2, jnp.int32)}), out_dtype=jnp.bfloat16)
    assert out.shape == (0, 4) and out.dtype == jnp.bfloat16


@pytest.mark.parametrize("weight", ["float", "int8"])
def test_rows_after_the_last_group_are_zero_whatever_they_hold(weight):
    inputs = Case("x", rows=5, groups=2, features=8, outputs=4, weight=weight).make(0)
    changed = inputs | {"x": inputs["x"].at[3:].set(jnp.nan), "sizes": jnp.asarray([1, 2], jnp.int32)}
    out = jax.jit(lambda inputs: xla.grouped_matmul(**inputs, out_dtype=jnp.float32))(changed)
    assert np.isfinite(out[:3]).all() and np.array_equal(out[3:], np.zeros((2, 4)))


def test_codes_are_converted_a_group_at_a_time():
    shape = jax.ShapeDtypeStruct
    arguments = shape((4, 512), jnp.float32), shape((64, 256, 512), jnp.int8), shape((64,), jnp.int32)
    run = jax.jit(lambda x, weight, sizes, scales: xla.grouped_matmul(x, weight, sizes, scales=scales, out_dtype=jnp.float32))
    memory = run.lower(*arguments, shape((64, 256), jnp.float32)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * 256 * 512
