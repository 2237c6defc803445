import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul.reference import grouped_matmul


def test_each_row_meets_its_group_alone():
    x = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [5.0, 5.0]])
    weight = jnp.asarray([[[1.0, 2.0]], [[7.0, 7.0]], [[10.0, 20.0]]])
    out = grouped_matmul(x, weight, jnp.asarray([2, 0, 1], jnp.int32))
    assert np.array_equal(out, [[1.0], [2.0], [30.0], [0.0]])
    scaled = grouped_matmul(x, weight, jnp.asarray([2, 0, 1], jnp.int32), scales=jnp.asarray([[2.0], [0.0], [0.5]]))
    assert np.array_equal(scaled, [[2.0], [4.0], [15.0], [0.0]])
