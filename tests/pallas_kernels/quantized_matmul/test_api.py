import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels.quantized_matmul import api

GOOD = {"x": jnp.zeros((2, 8), jnp.bfloat16), "weight": jnp.zeros((4, 8), jnp.int8), "scales": jnp.zeros((4, 1), jnp.float32)}
FOUR = {"weight": jnp.zeros((4, 4), jnp.uint8), "scales": jnp.zeros((4, 2), jnp.bfloat16), "zeros": jnp.zeros((4, 2), jnp.uint8)}


def test_the_package_exports_it():
    assert pallas_kernels.quantized_matmul is api.quantized_matmul


def test_good_arguments_pass():
    for arguments in (GOOD, GOOD | FOUR, GOOD | {"activations": "int8"}, GOOD | {"scales": jnp.ones((2, 4))}):
        api.check(**arguments)
        assert api.quantized_matmul(**arguments).dtype == jnp.bfloat16
    assert api.quantized_matmul(**GOOD, out_dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((2, 1, 8), jnp.float32)}, r"x is float32\[2, 1, 8\]; it must have shape \[tokens, in\]; flatten"),
        ({"x": jnp.zeros((2, 8), jnp.int8)}, "x is int8.*floating"),
        ({"weight": jnp.zeros((8, 4), jnp.int8)}, r"weight is int8\[8, 4\]; it must have shape \[8, 8\].*transposed"),
        ({"weight": jnp.zeros((4, 2, 8), jnp.int8)}, r"weight is int8\[4, 2, 8\]; it must have shape \[out, in\]"),
        ({"weight": jnp.zeros((4, 8), jnp.float32)}, "weight is float32.*it must be int8, float8_e4m3fn or uint8"),
        ({"weight": jnp.zeros((4, 8), jnp.uint8)}, r"weight is uint8\[4, 8\]; it must have shape \[4, 4\].*two inputs in a byte"),
        ({"scales": jnp.zeros(4, jnp.float32)}, r"scales is float32\[4\]; it must cut a weight \[4, 8\] into equal blocks"),
        ({"scales": jnp.zeros((4, 3), jnp.float32)}, r"scales is float32\[4, 3\]; it must cut"),
        ({"scales": jnp.zeros((4, 1), jnp.int32)}, "scales is int32.*floating"),
        ({"zeros": jnp.zeros((4, 1), jnp.uint8)}, "zeros is uint8.*4 bits only"),
        (FOUR | {"zeros": jnp.zeros((4, 1), jnp.uint8)}, r"zeros is uint8\[4, 1\]; it must have shape \[4, 2\]"),
        (FOUR | {"scales": jnp.ones((4, 8)), "zeros": None}, "even number of inputs"),
        ({"activations": "int4"}, "activations is 'int4'; it must be 'float' or 'int8'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^quantized_matmul: .*{message}"):
        api.check(**(GOOD | changes))
