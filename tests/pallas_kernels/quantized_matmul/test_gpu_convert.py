"""The order in which weights come out of registers (the kernel itself runs in test_gpu.py and in the contract test)."""

import jax.numpy as jnp
import numpy as np
import pytest

convert = pytest.importorskip("pallas_kernels.quantized_matmul.gpu_convert")


@pytest.mark.parametrize("bits", [8, 4])
def test_places_are_those_of_the_docstring(bits):
    found = np.asarray(convert.permute(jnp.arange(64.0)[None], bits))[0].astype(int)
    span = convert.SPANS[bits]
    for place, number in enumerate(found):
        tile, lane, element = place % span // 8, place % 8 // 2, place % 2
        inside = 4 * lane + 2 * tile + element if bits == 8 else 8 * lane + tile + 4 * element
        assert number == place // span * span + inside


def test_bits_of():
    assert [convert.bits_of(dtype) for dtype in (jnp.int8, jnp.float8_e4m3fn, jnp.int4)] == [8, 8, 4]
