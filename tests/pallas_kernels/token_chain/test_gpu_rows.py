"""What the kernel between two matmuls of int8 numbers gives, in jax's interpreter (the contract test runs whole chains)."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.token_chain.cases import CASES, TUNING

rows = pytest.importorskip("pallas_kernels.token_chain.gpu_rows")
RANDOM = np.random.default_rng(0)
TOKENS, DTYPE = 5, jnp.dtype("bfloat16")
ROW = rows.Row(width=256, piece=128, dtype=DTYPE, sums=True, gated=False, epsilon=None, offset=0.0, smooth=False)
WAYS = {
    "numbers": {"sums": False},
    "sums": {},
    "gated": {"gated": True},
    "normed": {"epsilon": 1e-5},
    "normed numbers": {"epsilon": 1e-5, "offset": 1.0, "sums": False},
    "gated, normed and smooth": {"gated": True, "epsilon": 1e-5, "smooth": True},
}


def given(row):
    """Sums or numbers, the stream, the norm's weight and smooth."""
    wide = row.width * (2 if row.gated else 1)
    tokens = jnp.asarray(np.exp2(RANDOM.uniform(-9, -7, (TOKENS, 1))).repeat(128, axis=1), jnp.float32)
    sums = jnp.asarray(RANDOM.integers(-30000, 30000, (TOKENS, wide)), jnp.int32)
    value = rows.Sums(sums, tokens, jnp.asarray(RANDOM.uniform(0.001, 0.002, wide), jnp.float32))
    drawn = [jnp.asarray(RANDOM.standard_normal(shape), DTYPE) for shape in ((TOKENS, row.width), (TOKENS, row.width), (row.width,))]
    smooth = jnp.asarray(RANDOM.uniform(0.5, 2.0, row.width), jnp.float32)
    return value if row.sums else drawn[0], drawn[1], drawn[2] if row.epsilon else None, smooth if row.smooth else None


def written_out(row, value, held, norm, smooth):
    """In float64: the numbers that are rounded, and the stream."""
    x = np.asarray(value.sums, np.float64) * np.asarray(value.tokens[:, :1]) * np.asarray(value.channels) if row.sums else value
    x, total = np.asarray(x, np.float64), np.asarray(held, np.float64)
    if row.gated:
        gate, up = np.split(x, 2, axis=1)
        x = gate / (1 + np.exp(-gate)) * up
    if norm is not None:
        total = total + x
        x = total / np.sqrt(np.mean(total**2, axis=1, keepdims=True) + row.epsilon) * (np.asarray(norm, np.float64) + row.offset)
    return x if smooth is None else x * np.asarray(smooth, np.float64), total


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_rounded_as_they_say(interpreted, way):
    """Within half a step and what bfloat16 leaves out before."""
    row = ROW._replace(**WAYS[way])
    inputs = given(row)
    found, (wanted, total) = rows._rounded(*inputs, row=row, interpreted=True), written_out(row, *inputs)
    scales = np.asarray(found.scales, np.float64)
    assert (scales == scales[:, :1]).all() and found.values.dtype == jnp.int8
    top = np.abs(wanted).max(axis=1, keepdims=True)
    np.testing.assert_allclose(scales[:, :1], top / 127, rtol=2**-6)
    off = np.abs(np.asarray(found.values, np.float64) * scales[:, :1] - wanted)
    assert (off <= 0.51 * scales[:, :1] + 2**-6 * np.abs(wanted)).all()
    np.testing.assert_allclose(np.asarray(found.total, np.float64), total, rtol=2**-7, atol=2**-6)


def test_zeros_have_scale_one(interpreted):
    row = ROW._replace(sums=False)
    found = rows._rounded(jnp.zeros((2, 256), DTYPE), jnp.zeros((2, 256), DTYPE), None, None, row=row, interpreted=True)
    assert not found.values.any() and (found.scales == 1).all()


def test_a_token_depends_on_itself_alone(interpreted):
    case = next(case for case in CASES if case.name == "many_last")
    inputs = case.make(0)
    whole = case.run(inputs, "gpu")
    some = replace(case, tokens=2).run(inputs | {name: inputs[name][1:3] for name in ("x", "held")}, "gpu")
    for mine, wanted in zip(some, whole, strict=True):
        assert np.array_equal(mine, wanted[1:3])


@pytest.mark.parametrize("name", ["many", "many_smooth", "many_last", "many_offset", "many_gated"])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_is_not_hidden(interpreted, bad, name):
    """And stays in its row."""
    case = next(case for case in CASES if case.name == name)
    inputs = case.make(0)
    for implementation in ("gpu", "reference"):
        out, total = case.run(inputs | {"x": inputs["x"].at[1, 5].set(bad)}, implementation)
        assert not jnp.isfinite(out[1]).any() and jnp.isfinite(total[2:]).all() and jnp.isfinite(out[2:]).all()


@pytest.mark.parametrize(("changes", "reason"), [({}, None), ({"in1": 192}, "128 up to 16384, not 192"), ({"in2": 2**15}, "32768")])
def test_what_it_refuses(changes, reason):
    found = rows.refusal(TUNING[2].tuning_key() | changes)
    assert found is None if reason is None else reason in found
