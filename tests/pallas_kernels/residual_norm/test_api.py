import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels.residual_norm import api, reference

GOOD = {name: jnp.ones((2, 8) if name != "weight" else (8,), jnp.bfloat16) for name in ("x", "added", "weight")}


def test_the_package_exports_it():
    assert pallas_kernels.residual_norm is api.residual_norm
    assert pallas_kernels.Normed is reference.Normed


def test_good_arguments_pass():
    found = api.residual_norm(**GOOD, epsilon=0.0)
    assert found.normed.dtype == found.total.dtype == jnp.bfloat16
    assert float(found.total[1, 7]) == 2 and float(found.normed[1, 7]) == 1
    alone = api.residual_norm(GOOD["x"], None, GOOD["weight"], epsilon=0.0)
    assert alone.total is GOOD["x"]


def test_key():
    assert api.key_of(GOOD["x"], None) == {"tokens": 2, "features": 8, "dtype": "bfloat16", "added": "nothing"}
    assert api.key_of(GOOD["x"], GOOD["added"])["added"] == "given"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((2, 1, 8), jnp.bfloat16)}, r"x is bfloat16\[2, 1, 8\]; it must have shape \[tokens, features\]; flatten"),
        ({"x": jnp.zeros((2, 8), jnp.int8)}, "x is int8.*floating"),
        ({"x": jnp.zeros((2, 0), jnp.bfloat16)}, "no norm of nothing"),
        ({"weight": jnp.zeros((4,), jnp.bfloat16)}, r"weight is bfloat16\[4\]; it must have shape \[8\]"),
        ({"weight": jnp.zeros((8,), jnp.float32)}, "weight is float32.*it must be bfloat16"),
        ({"added": jnp.zeros((1, 8), jnp.bfloat16)}, r"added is bfloat16\[1, 8\]; it must have shape \[2, 8\]"),
        ({"added": jnp.zeros((2, 8), jnp.float32)}, "added is float32.*it must be bfloat16"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^residual_norm: .*{message}"):
        api.check(**(GOOD | changes))
