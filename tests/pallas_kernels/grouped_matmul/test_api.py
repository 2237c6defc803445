import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels.grouped_matmul import api

GOOD = {"x": jnp.zeros((3, 8), jnp.bfloat16), "weight": jnp.zeros((2, 4, 8), jnp.bfloat16), "sizes": jnp.asarray([1, 2], jnp.int32)}
CODES = {"weight": jnp.zeros((2, 4, 8), jnp.int8), "scales": jnp.ones((2, 4), jnp.float32)}


def test_the_package_exports_it():
    assert pallas_kernels.grouped_matmul is api.grouped_matmul


def test_good_arguments_pass():
    for arguments in (GOOD, GOOD | CODES):
        assert api.grouped_matmul(**arguments).dtype == jnp.bfloat16
    assert api.grouped_matmul(**GOOD, out_dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((3, 1, 8), jnp.bfloat16)}, r"x is bfloat16\[3, 1, 8\]; it must have shape \[rows, in\]"),
        ({"x": jnp.zeros((3, 8), jnp.int8)}, "x is int8.*floating"),
        ({"weight": jnp.zeros((4, 8), jnp.bfloat16)}, r"weight is bfloat16\[4, 8\]; it must have shape \[groups, out, in\]"),
        ({"weight": jnp.zeros((2, 8, 4), jnp.bfloat16)}, r"weight is bfloat16\[2, 8, 4\]; it must have shape \[2, 8, 8\].*transposed"),
        ({"weight": jnp.zeros((2, 4, 8), jnp.int8)}, "weight is int8.*it must be bfloat16"),
        ({"sizes": jnp.zeros(3, jnp.int32)}, r"sizes is int32\[3\]; it must have shape \[2\]"),
        ({"sizes": jnp.zeros(2, jnp.float32)}, "sizes is float32.*it must be int32"),
        ({"scales": jnp.ones((2, 4))}, "weight is bfloat16.*with scales it must be int8 or float8_e4m3fn"),
        (CODES | {"scales": jnp.ones((2, 1))}, r"scales is float32\[2, 1\]; it must have shape \[2, 4\]"),
        (CODES | {"scales": jnp.ones((2, 4), jnp.int32)}, "scales is int32.*floating"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^grouped_matmul: .*{message}"):
        api.check(**{"scales": None} | GOOD | changes)
