"""The matmul against float64, dense and quantised, on one device and on shards of every kind."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.quant import int8
from jaxinfer.quant.matmul import matmul, sharded_matmul
from jaxinfer.quant.qarray import QArray, dequantize
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
    scales = int8.scales(np.asarray(weight), contracting)
    quantised = QArray(jnp.asarray(int8.values(np.asarray(weight), scales)), jnp.asarray(scales))
    exact = matmul(x, dequantize(quantised), out_dtype=jnp.dtype("float32"))
    mesh = make_mesh({"tensor": 2})
    sharded = sharded_matmul(x, quantised, CASES[case][1], mesh=mesh, rules=DEFAULT_RULES, out_dtype=jnp.dtype("float32"))
    for found in (matmul(x, quantised, out_dtype=jnp.dtype("float32")), sharded):
        assert np.allclose(found, exact, rtol=1e-4, atol=1e-4)


def test_the_result_has_the_dtype_asked_for():
    x, weight, product = arrays("columns")
    x, weight = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
    assert matmul(x, weight, out_dtype=jnp.dtype("bfloat16")).dtype == jnp.bfloat16
    logits = matmul(x, weight, out_dtype=jnp.dtype("float32"))
    assert logits.dtype == jnp.float32
    assert np.abs(np.asarray(logits) - product).max() < 0.1
    scales = int8.scales(np.asarray(weight), 1)
    quantised = QArray(jnp.asarray(int8.values(np.asarray(weight), scales)), jnp.asarray(scales))
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
