import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels.quantized_matmul import api

GOOD = {"x": jnp.zeros((2, 8), jnp.bfloat16), "weight": jnp.zeros((4, 8), jnp.int8), "scales": jnp.zeros(4, jnp.float32)}


def test_the_package_exports_it():
    assert pallas_kernels.quantized_matmul is api.quantized_matmul


def test_good_arguments_pass():
    api.check(**GOOD)
    assert api.quantized_matmul(**GOOD).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((2, 1, 8), jnp.float32)}, r"x is float32\[2, 1, 8\]; it must have shape \[tokens, in\]; flatten"),
        ({"x": jnp.zeros((2, 8), jnp.int8)}, "x is int8.*floating"),
        ({"weight": jnp.zeros((8, 4), jnp.int8)}, r"weight is int8\[8, 4\]; it must have shape \[8, 8\].*transposed"),
        ({"weight": jnp.zeros((4, 2, 8), jnp.int8)}, r"weight is int8\[4, 2, 8\]; it must have shape \[out, in\]"),
        ({"weight": jnp.zeros((4, 8), jnp.float32)}, "weight is float32.*it must be int8"),
        ({"scales": jnp.zeros(8, jnp.float32)}, r"scales is float32\[8\]; it must have shape \[4\]"),
        ({"scales": jnp.zeros(4, jnp.int32)}, "scales is int32.*floating"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^quantized_matmul: .*{message}"):
        api.check(**(GOOD | changes))
