import jax.numpy as jnp
import pytest

from pallas_kernels import checks


def test_require():
    checks.require(True, "op", "problem", "remedy")
    with pytest.raises(ValueError, match=r"^op: problem; remedy$"):
        checks.require(False, "op", "problem", "remedy")


def test_describe():
    assert checks.describe(jnp.zeros((8, 64), jnp.bfloat16)) == "bfloat16[8, 64]"


def test_shape_and_dtype_messages():
    x = jnp.zeros((2, 3), jnp.float32)
    checks.require_shape("op", "x", x, (2, 3), "rows, columns")
    checks.require_dtype("op", "x", x, jnp.float32, "sums")
    with pytest.raises(ValueError, match=r"op: x is float32\[2, 3\]; it must have shape \[2, 4\] \(rows, columns\)"):
        checks.require_shape("op", "x", x, (2, 4), "rows, columns")
    with pytest.raises(ValueError, match=r"op: x is float32\[2, 3\]; it must be int32 \(ids\); cast it before the call"):
        checks.require_dtype("op", "x", x, jnp.int32, "ids")
