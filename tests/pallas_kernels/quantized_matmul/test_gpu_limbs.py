"""A few tokens in limbs: how the weight is dealt out, what fits, and the kernel in jax's interpreter (the contract test runs it too)."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hopper
from pallas_kernels.quantized_matmul.cases import Case

few = pytest.importorskip("pallas_kernels.quantized_matmul.gpu_limbs")
SHAPES = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256), (128, 64), (384, 328)]


def key(tokens=64, features=4096, outputs=4096, **changes):
    return Case("x", tokens, features, outputs, **{"dtype": "bfloat16"} | changes).tuning_key()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [2, 24, 64])
def test_all_is_dealt_out_once_and_fits(monkeypatch, shape, tokens):
    monkeypatch.setattr(hopper, "cores", lambda: 132)
    found = few.candidates(key(tokens, *shape))
    assert found and [plan.cost for plan in found] == sorted(plan.cost for plan in found)
    for plan in found:
        rows = [int(plan.first(group)) for group in range(plan.groups)]
        blocks = [int(plan.begin(split)) for split in range(plan.splits + 1)]
        assert rows[0] == 0 and rows[-1] + plan.rows == shape[1] and (blocks[0], blocks[-1]) == (0, shape[0] // plan.block)
        assert all(0 < step <= plan.rows and step % 8 == 0 for step in np.diff(rows)) and min(np.diff(blocks)) > 0
        assert 1 <= plan.consumers <= 4 and plan.rows + plan.rest == 64 * plan.consumers and 0 <= plan.rest < 64
        bytes_of_stages = plan.block * (plan.stages * (plan.rows + 2 * plan.tokens) + plan.rest)
        assert plan.stages >= few.LEAST_STAGES and bytes_of_stages + 2048 <= hopper.SHARED_BYTES
        assert plan.times == 1 or (plan.splits == 1 and shape[1] > 132 * 256)
        assert few.plan_of(tokens, *shape, plan.block, plan.splits) == plan


def test_an_8b_model_is_dealt_out_evenly(monkeypatch):
    """Groups, splits and rows of what was fastest on an H200, and what is guessed where nothing was measured."""
    monkeypatch.setattr(hopper, "cores", lambda: 132)
    found = [few.candidates(key(64, *shape))[0] for shape in SHAPES[:4]]
    assert [(plan.groups, plan.splits, plan.rows) for plan in found] == [(128, 1, 48), (128, 1, 32), (128, 1, 224), (64, 2, 64)]


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"tokens": 2}, True),
        ({"tokens": 1}, False),
        ({"tokens": 65}, False),
        ({"features": 192}, False),
        ({"features": few.MOST_INPUTS}, True),
        ({"features": few.MOST_INPUTS + 128}, False),
        ({"outputs": 96}, True),
        ({"outputs": 100}, False),
        ({"rows": 64}, True),
        ({"dtype": "float16"}, False),
        ({"weight": "fp8"}, False),
        ({"group": 128}, False),
        ({"activations": "int8"}, False),
    ],
)
def test_what_fits(changes, fits):
    assert few.fits(key(**changes)) == fits
    assert not few.fits({"dtype": "bfloat16"})


def test_the_largest_sums_fit():
    assert 128 * 128 * few.MOST_INPUTS < 2**31


def drawn(tokens, inputs, outputs):
    """Tokens of which outliers are 10^6 times the rest; weights of which many are -128; scales of rows."""
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, inputs)) * 10.0 ** rng.uniform(-3, 3, (tokens, inputs))
    weight = np.where(rng.random((outputs, inputs)) < 0.1, -128, rng.integers(-128, 128, (outputs, inputs))).astype(np.int8)
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight), jnp.asarray(10.0 ** rng.uniform(-4, -1, (outputs, 1)), jnp.float32)


def product(x, weight, scales, *sizes):
    plan = few.plan_of(*x.shape, weight.shape[0], *(sizes or (128, 1)))
    return few.multiply(x, weight, scales, plan=plan, out_dtype=jnp.dtype(jnp.float32))


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((17, 384, 328), (128, 2)), ((5, 512, 256), (256, 1)), ((64, 256, 64), (128, 1)), ((24, 640, 1224), (128, 1))],
)
def test_against_float64(interpreted, shape, sizes):
    """Off by no more than what inputs may cause that are off by the documented share of a token's largest; the last shape takes blocks of
    threads three times, and two of them have rows in common."""
    x, weight, scales = drawn(*shape)
    found = np.asarray(product(x, weight, scales, *sizes), np.float64)
    wide, weights = np.asarray(x, np.float64), np.asarray(weight, np.float64) * np.asarray(scales)
    allowed = np.abs(wide).max(axis=1, keepdims=True) / 65000 * np.abs(weights).sum(axis=1)
    assert found.shape == (shape[0], shape[2]) and (np.abs(found - wide @ weights.T) < allowed).all() and np.abs(found).max() > 0


def test_a_token_depends_on_itself_alone(interpreted):
    """Whatever the others are, and what is not finite gives NaN."""
    x, weight, scales = drawn(9, 256, 192)
    whole, part = product(x, weight, scales), product(x[3:5].at[1, 7].set(jnp.inf), weight, scales)
    assert np.array_equal(whole[3], part[0]) and np.isnan(part[1]).all() and np.isfinite(whole).all()
