"""Tokens in limbs, by the kernel in jax's interpreter."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper_limbs import LEAST

gpu_cut = pytest.importorskip("pallas_kernels.quantized_matmul.gpu_cut")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("inputs", [128, 640, 2048, 4224])
def test_limbs_are_worth_their_inputs(interpreted, inputs):
    rng = np.random.default_rng(inputs)
    values = rng.standard_normal((11, inputs)) * np.exp2(rng.integers(-30, 30, (11, 1)))
    values[1], values[2], values[3, 5], values[4, inputs - 1] = 0, values[2] * 2.0**-110, np.inf, np.nan
    x = jnp.asarray(values, jnp.bfloat16)
    limbs, sizes = map(np.asarray, gpu_cut.cut(x))
    assert limbs.shape == (32, inputs) and limbs.dtype == np.int8 and sizes.shape == (16,)
    sizes = sizes[:11]
    assert np.isnan(sizes).nonzero()[0].tolist() == [3, 4]
    wide, finite = np.asarray(x, np.float64), ~np.isnan(sizes)
    found = (limbs[0:22:2].astype(np.float64) + 256.0 * limbs[1:22:2]) * sizes[:, None]
    top = np.maximum(np.abs(wide).max(axis=1, keepdims=True), LEAST)[finite]
    assert (np.abs(found - wide)[finite] * 65000 <= top).all()


def test_the_largest_inputs_fit(interpreted):
    limbs, sizes = map(np.asarray, gpu_cut.cut(jnp.asarray([[3.0] * 64 + [-3.0] * 64], jnp.bfloat16)))
    assert set(limbs[0]) == {127, -127} and set(limbs[1]) == {127, -127} and sizes[0] * gpu_cut.RANGE == np.float32(3)
