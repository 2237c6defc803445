import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul.formats import Format, halves, spread


def test_formats_are_named():
    weight, scales = jnp.zeros((4, 8), jnp.uint8), jnp.ones((2, 4))
    assert Format.of(weight, scales, "float") == ("int4", 2, 4, "float")
    assert Format.of(weight.astype(jnp.int8), jnp.ones((4, 1)), "int8") == ("int8", 1, 0, "int8")
    assert Format.of(weight.astype(jnp.float8_e4m3fn), scales[:1, :1], "float") == ("fp8", 4, 0, "float")


def test_the_low_half_is_the_even_input():
    even, odd = halves(jnp.asarray([[0x21]], jnp.uint8))
    assert (even[0, 0], odd[0, 0]) == (1, 2)


def test_spread():
    assert np.array_equal(spread(jnp.asarray([[1, 2]]), (2, 4)), [[1, 1, 2, 2]] * 2)
