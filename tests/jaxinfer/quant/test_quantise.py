"""Whole weights, every scheme: what the oracle reads is near the weight, and qwix finds the same numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.config import ConfigError
from jaxinfer.quant.find import schemes
from jaxinfer.quant.qarray import INT8, check, dequantize, describe, relative_error
from jaxinfer.quant.quantise import quantise, quantise_as
from jaxinfer.sharding import ArraySpec

WEIGHT = np.random.default_rng(0).normal(size=(16, 2, 128)).astype(np.float32)
ERRORS = {"int8": 0.01, "w8a8": 0.01, "fp8": 0.03, "int4": 0.13}


@pytest.mark.parametrize("scheme", schemes())
@pytest.mark.parametrize("contracting", [1, 2])
def test_every_scheme_stays_near(scheme, contracting):
    weight = quantise(WEIGHT, contracting, scheme)
    check(weight)
    assert weight.shape == WEIGHT.shape
    assert 1e-4 < relative_error(weight, jnp.asarray(WEIGHT)) < ERRORS.get(scheme, 0.2)


def test_schemes_that_do_not_exist_and_arrays_that_cannot_be_found():
    with pytest.raises(ConfigError, match="does not exist"):
        quantise(WEIGHT, 1, "int5")
    spec = describe(ArraySpec((2, 4), np.dtype(np.float32), (None, None)), 1, (1, 4), INT8, scheme="w8a8", extras=("smooth",))
    with pytest.raises(ValueError, match="calibration"):
        quantise_as(np.ones((2, 4), np.float32), spec)


@pytest.mark.parametrize(
    ("scheme", "qtype", "stretched", "tolerance"),
    [
        ("int8", "int8", 127.5 / 127, 1e-5),  # its int8 goes to 127.5 steps, ours to 127
        ("w8a8", "int8", 127.5 / 127, 1e-5),
        ("fp8", "float8_e4m3fn", 1, 1e-5),
        ("int4", "int4", 1, 2**-8),  # our scales are rounded to bfloat16
    ],
)
def test_qwix_finds_the_same(scheme, qtype, stretched, tolerance):
    """Scales and values by other people's code: each value the same, or a neighbour where it lies between two."""
    qwix = pytest.importorskip("qwix._src.core.qarray")
    rows, ours = WEIGHT.reshape(32, 128), quantise(WEIGHT.reshape(32, 128), 1, scheme)
    how = qwix.HowToQuantize(
        qtype=jnp.dtype(qtype), channelwise_axes=(0,), tiled_axes={1: ours.blocks[1]}, calibration_method=f"absmax,{stretched}"
    )
    theirs = qwix.quantize(jnp.asarray(rows), how)
    assert np.allclose(np.asarray(theirs.scale, np.float32), np.asarray(ours.scales, np.float32), rtol=tolerance)
    found, wanted = np.asarray(dequantize(ours)), np.asarray(qwix.dequantize(theirs))
    assert np.isclose(found, wanted, rtol=2 * tolerance).mean() > 0.97
    assert np.allclose(found, wanted, atol=float(np.max(np.asarray(ours.scales, np.float32))) * (32 if scheme == "fp8" else 1.1))
