import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels.dense_matmul import api

GOOD = {"x": jnp.zeros((2, 8), jnp.bfloat16), "weight": jnp.zeros((4, 8), jnp.bfloat16)}


def test_the_package_exports_it():
    assert pallas_kernels.dense_matmul is api.dense_matmul


def test_good_arguments_pass():
    assert api.dense_matmul(**GOOD).dtype == jnp.bfloat16
    assert api.dense_matmul(**GOOD, out_dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((2, 1, 8), jnp.bfloat16)}, r"x is bfloat16\[2, 1, 8\]; it must have shape \[tokens, in\]; flatten"),
        ({"x": jnp.zeros((2, 8), jnp.int8)}, "x is int8.*floating"),
        ({"weight": jnp.zeros((8, 4), jnp.bfloat16)}, r"weight is bfloat16\[8, 4\]; it must have shape \[8, 8\].*transposed"),
        ({"weight": jnp.zeros((4, 2, 8), jnp.bfloat16)}, r"weight is bfloat16\[4, 2, 8\]; it must have shape \[out, in\]"),
        ({"weight": jnp.zeros((4, 8), jnp.float32)}, "weight is float32.*it must be bfloat16"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^dense_matmul: .*{message}"):
        api.check(**(GOOD | changes))
