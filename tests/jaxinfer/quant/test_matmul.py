"""The matmul against float64, dense and quantised, on one device and on shards of every kind."""

import math
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.quant.blocks import counts
from jaxinfer.quant.matmul import matmul, rows_of, sharded_matmul
from jaxinfer.quant.observe import Observed
from jaxinfer.quant.qarray import FP8, INT8, PACKED, QArray, dequantize
from jaxinfer.quant.quantise import quantise
from jaxinfer.sharding import DEFAULT_RULES, make_mesh

RANDOM = np.random.default_rng(0)
CASES = {
    "columns": ((2, 24, 16), ("kv_heads", None, "embed"), 1),
    "rows": ((16, 8, 3, 2), ("embed", "mlp", None, None), 3),
    "inner": ((2, 8, 16), (None, "mlp", "embed"), 1),
    "nothing divides": ((3, 10), ("vocab", "embed"), 1),
}


def arrays(case):
    """x, weight and their product in float64."""
    shape, _, contracting = CASES[case]
    x = RANDOM.normal(size=(6, *shape[-contracting:])).astype(np.float32)
    weight = RANDOM.normal(size=shape).astype(np.float32)
    product = np.tensordot(x.astype(np.float64), weight.astype(np.float64), (tuple(range(1, x.ndim)), tuple(range(-contracting, 0))))
    return jnp.asarray(x), jnp.asarray(weight), product


@pytest.mark.parametrize("mesh", [{}, {"tensor": 4}, {"data": 2, "tensor": 4}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_sharding_computes_the_product(case, mesh):
    x, weight, product = arrays(case)
    run = jax.jit(
        lambda x, weight: sharded_matmul(
            x, weight, CASES[case][1], mesh=make_mesh(mesh), rules=DEFAULT_RULES, out_dtype=jnp.dtype("float32")
        )
    )
    assert np.allclose(run(x, weight), product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["columns", "rows"])
def test_a_quantised_weight_computes_what_its_oracle_says(case):
    x, weight, _ = arrays(case)
    contracting = CASES[case][2]
    quantised = quantise(np.asarray(weight), contracting, "int8")
    exact = matmul(x, dequantize(quantised), out_dtype=jnp.dtype("float32"))
    mesh = make_mesh({"tensor": 2})
    sharded = sharded_matmul(x, quantised, CASES[case][1], mesh=mesh, rules=DEFAULT_RULES, out_dtype=jnp.dtype("float32"))
    for found in (matmul(x, quantised, out_dtype=jnp.dtype("float32")), sharded):
        assert np.allclose(found, exact, rtol=1e-4, atol=1e-4)


def test_inputs_are_taken_in_the_order_of_the_columns():
    """On shards of the inputs; `tests/jaxinfer/checkpoint/test_stored.py` has it on one device."""
    x, weight, _ = arrays("rows")
    order = jnp.asarray(RANDOM.permutation(math.prod(x.shape[1:])), jnp.int32)
    ordered = replace(quantise(np.asarray(weight), CASES["rows"][2], "int8"), order=order)
    exact = np.tensordot(np.asarray(x), np.asarray(dequantize(ordered)), ((1, 2, 3), (1, 2, 3)))
    placing = {"mesh": make_mesh({"tensor": 2}), "rules": DEFAULT_RULES, "out_dtype": jnp.dtype("float32")}
    run = jax.jit(lambda x, weight: sharded_matmul(x, weight, CASES["rows"][1], **placing))
    assert np.allclose(run(x, ordered), exact, rtol=1e-4, atol=1e-4)


def test_the_result_has_the_dtype_asked_for():
    x, weight, product = arrays("columns")
    x, weight = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
    assert matmul(x, weight, out_dtype=jnp.dtype("bfloat16")).dtype == jnp.bfloat16
    logits = matmul(x, weight, out_dtype=jnp.dtype("float32"))
    assert logits.dtype == jnp.float32
    assert np.abs(np.asarray(logits) - product).max() < 0.1
    quantised = quantise(np.asarray(weight), 1, "int8")
    assert matmul(x, quantised, out_dtype=jnp.dtype("float32")).dtype == jnp.float32


@pytest.mark.parametrize("tokens", [1, 2, 16, 17])
@pytest.mark.parametrize("out", [6, 7])
def test_every_number_of_tokens(tokens, out):
    x, weight = RANDOM.normal(size=(tokens, 5)).astype(np.float32), RANDOM.normal(size=(out, 5)).astype(np.float32)
    assert np.allclose(matmul(jnp.asarray(x), jnp.asarray(weight), out_dtype=jnp.dtype("float32")), x @ weight.T, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 4, 64])
def test_weights_are_not_copied(tokens):
    """XLA transposes the weight of a dot over several dimensions; as a plain matrix it is read where it lies."""
    run = jax.jit(lambda x, weight: matmul(x, weight, out_dtype=jnp.dtype("float32")))
    lowered = run.lower(jax.ShapeDtypeStruct((tokens, 64), jnp.float32), jax.ShapeDtypeStruct((2, 48, 64), jnp.float32))
    moved = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", lowered.compile().as_text())
    assert 2 * 48 * 64 not in [math.prod(map(int, shape.split(","))) for shape in moved]


LAYOUTS = {
    "tiles of rows and inputs": ((4, 16, 64), ("mlp", None, "embed"), 1, FP8, (1, 8, 32)),
    "groups over two dimensions, cut by the mesh": ((8, 4, 2, 16), ("embed", "mlp", None, None), 3, PACKED, (1, 1, 2, 16)),
    "groups that the mesh would cut": ((8, 4, 2, 16), ("embed", "mlp", None, None), 3, PACKED, (1, 2, 2, 16)),
    "one scale": ((6, 8), ("vocab", "embed"), 1, FP8, (6, 8)),
    "blocks that are no run": ((4, 2, 8), ("mlp", None, "embed"), 1, INT8, (2, 1, 4)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_blocks_on_a_mesh_compute_what_the_oracle_says(layout):
    shape, axes, contracting, dtype, blocks = LAYOUTS[layout]
    values = RANDOM.integers(0, 100, shape).astype(np.float32).astype(dtype)
    weight = QArray(
        jnp.asarray(values[..., : shape[-1] // 2] if dtype == PACKED else values),
        jnp.asarray(RANDOM.uniform(0.5, 1.5, counts(shape, blocks)), jnp.float32),
        jnp.asarray(RANDOM.integers(0, 17, counts(shape, blocks)), jnp.uint8) if dtype == PACKED else None,
        jnp.asarray(RANDOM.uniform(0.5, 1.5, shape[-contracting:]), jnp.float32),
    )
    x = jnp.asarray(RANDOM.normal(size=(4, *shape[-contracting:])), jnp.float32)
    exact = np.tensordot(x, jax.jit(dequantize)(weight), (tuple(range(1, x.ndim)), tuple(range(-contracting, 0))))
    for mesh in (make_mesh({}), make_mesh({"data": 2, "tensor": 4})):
        run = partial(sharded_matmul, axes=axes, mesh=mesh, rules=DEFAULT_RULES, out_dtype=jnp.dtype("float32"))
        found = jax.jit(run)(x, weight)
        assert np.allclose(found, exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max())


def test_activations_are_quantised_token_by_token():
    x, weight, product = arrays("columns")
    quantised = quantise(np.asarray(weight), 1, "w8a8")
    found = matmul(x * 10.0 ** jnp.arange(6.0)[:, None] / 1e3, quantised, out_dtype=jnp.dtype("float32"))
    wanted = product * 10.0 ** np.arange(6.0)[:, None, None] / 1e3
    errors = np.abs(found - wanted).max((1, 2)) / np.abs(wanted).max((1, 2))
    assert errors.min() > 1e-4 and errors.max() < 0.02


@pytest.mark.parametrize("case", CASES)
def test_rows_of_a_weight_stand_for_it(case):
    _, weight, _ = arrays(case)
    contracting = CASES[case][2]
    matrix = (math.prod(weight.shape[: weight.ndim - contracting]), math.prod(weight.shape[-contracting:]))
    plain, coded = rows_of(weight, contracting), rows_of(quantise(np.asarray(weight), contracting, "int8"), contracting)
    assert plain is not None and coded is not None and plain.scales is None
    assert np.array_equal(plain.values, weight.reshape(matrix))
    assert coded.values.dtype == INT8 and coded.scales is not None and coded.scales.shape == (matrix[0], 1)
    twin = dequantize(quantise(np.asarray(weight), contracting, "int8"))
    np.testing.assert_allclose(coded.values.astype(jnp.float32) * coded.scales, twin.reshape(matrix), rtol=1e-6)


def test_rows_say_how_inputs_come():
    weight = quantise(RANDOM.normal(size=(8, 4, 4)).astype(np.float32), 2, "w8a8")
    found = rows_of(replace(weight, smooth=jnp.ones((4, 4))), 2)
    assert found is not None and found.activations == "int8" and found.smooth is not None and found.smooth.shape == (16,)
    assert rows_of(weight, 2) is not None and rows_of(weight, 2).smooth is None


@pytest.mark.parametrize("scheme", ["fp8", "int4"])
def test_other_weights_have_no_such_rows(scheme):
    weight = quantise(RANDOM.normal(size=(8, 128)).astype(np.float32), 1, scheme)
    assert rows_of(weight, 1) is None and rows_of(Observed(weight, print), 1) is None


@pytest.mark.parametrize("changes", [{"order": (16,)}, {"scales": (8, 2)}, {"scales": (2, 1)}], ids=str)
def test_int8_has_such_rows_with_a_scale_for_each_and_nothing_else(changes):
    weight = quantise(RANDOM.normal(size=(8, 16)).astype(np.float32), 1, "int8")
    made = {name: jnp.arange(16) if name == "order" else jnp.ones(shape) for name, shape in changes.items()}
    assert rows_of(weight, 1) is not None and rows_of(replace(weight, **made), 1) is None
