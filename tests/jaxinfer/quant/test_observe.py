"""Inputs of an observed weight are seen and the product stays what it is."""

import jax.numpy as jnp
import numpy as np

from jaxinfer.quant.matmul import sharded_matmul
from jaxinfer.quant.observe import Observed
from jaxinfer.sharding import DEFAULT_RULES, make_mesh


def test_a_product_is_seen():
    x, weight, seen = jnp.arange(6.0).reshape(2, 3), jnp.ones((4, 3)), []
    options = {"mesh": make_mesh({}), "rules": DEFAULT_RULES, "out_dtype": np.dtype(np.float32)}
    plain = sharded_matmul(x, weight, (None, None), **options)
    assert np.array_equal(sharded_matmul(x, Observed(weight, seen.append), (None, None), **options), plain)
    assert len(seen) == 1 and seen[0] is x
