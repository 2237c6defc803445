"""Layers against a few lines of NumPy, and what a step refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models import layers
from jaxinfer.models.layers import Dim, Embedding, GatedMLP, HeadShape, Placement, Projection, RMSNorm, StepContext
from jaxinfer.models.rope import Rope
from jaxinfer.sharding import make_mesh
from pallas_kernels import AttentionSpec, PagedMetadata, kv_layout

RANDOM = np.random.default_rng(0)
F32 = np.dtype(np.float32)
ONE = Placement(make_mesh({}))


def fill(param, scale=1.0):
    """Put numbers where a description is."""
    spec = param.get_value()
    values = (RANDOM.normal(size=spec.shape) * scale).astype(spec.dtype)
    param.set_value(jnp.asarray(values))
    return values.astype(np.float64)


def test_weights_are_described_not_made():
    layer = Projection([Dim(2, "kv_heads"), Dim(3)], [Dim(5, "embed")], F32, bias=True)
    assert isinstance(layer.weight.get_value(), jax.ShapeDtypeStruct)
    assert (layer.weight.spec.axes, layer.weight.contracting) == (("kv_heads", None, "embed"), 1)
    assert (layer.bias.spec.shape, layer.bias.contracting) == ((2, 3), 0)


def test_projection():
    layer = Projection([Dim(2), Dim(3)], [Dim(5)], F32, bias=True)
    weight, bias = fill(layer.weight), fill(layer.bias)
    x = RANDOM.normal(size=(4, 5)).astype(np.float32)
    assert np.allclose(layer(jnp.asarray(x), ONE), np.einsum("ti,oki->tok", x, weight) + bias, atol=1e-5)


def test_norm_is_computed_in_float32():
    norm = RMSNorm(8, 1e-6, np.dtype(jnp.bfloat16))
    weight = fill(norm.weight)
    x = jnp.asarray(RANDOM.normal(size=(3, 8)) * 100, jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    exact = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-6) * weight
    assert norm(x).dtype == jnp.bfloat16
    assert np.allclose(np.asarray(norm(x), np.float64), exact, rtol=2**-6)


def test_gated_mlp():
    mlp = GatedMLP(5, 7, F32, bias=True)
    gate_up, gate_up_bias = fill(mlp.gate_up.weight), fill(mlp.gate_up.bias)
    down, down_bias = fill(mlp.down.weight), fill(mlp.down.bias)
    x = RANDOM.normal(size=(4, 5)).astype(np.float32)
    gate, up = (x @ gate_up[i].T + gate_up_bias[i] for i in range(2))
    assert np.allclose(mlp(jnp.asarray(x), ONE), (gate / (1 + np.exp(-gate)) * up) @ down.T + down_bias, atol=1e-4)


@pytest.mark.parametrize("mesh", [{}, {"tensor": 4}, {"data": 2, "tensor": 2}], ids=str)
def test_embedding_with_a_sharded_vocabulary(mesh):
    table = Embedding(12, 6, F32)
    weight = fill(table.weight)
    placement = Placement(make_mesh(mesh))
    found = jax.jit(lambda tokens: table(tokens, placement))(jnp.asarray([0, 11, 5, 3], jnp.int32))
    assert np.array_equal(found, weight[[0, 11, 5, 3]])


def attention_inputs(rows, replicas):
    """Every row decodes one token at position 0, into page 1 + its number within its replica."""
    own = 1 + np.arange(rows) % (rows // replicas)
    counted = jnp.asarray(np.arange(rows) % (rows // replicas), jnp.int32)
    metadata = PagedMetadata(
        page_tables=jnp.asarray(own[:, None], jnp.int32),
        query_starts=counted,
        query_lengths=jnp.ones(rows, jnp.int32),
        kv_lengths=jnp.ones(rows, jnp.int32),
        decode_rows=rows // replicas,
    )
    return jnp.zeros(rows, jnp.int32), metadata


@pytest.mark.parametrize("mesh", [{}, {"tensor": 2}, {"tensor": 4}, {"data": 2, "tensor": 2}], ids=str)
def test_attention_to_oneself_is_ones_own_value(mesh):
    rows, placement = 4, Placement(make_mesh(mesh))
    replicas = placement.mesh.shape["data"]
    positions, metadata = attention_inputs(rows, replicas)
    q = jnp.asarray(RANDOM.normal(size=(rows, 4, 8)), jnp.float32)
    k, v = (jnp.asarray(RANDOM.normal(size=(rows, 2, 8)), jnp.float32) for _ in range(2))
    pool = jnp.zeros(kv_layout("auto", kv_heads=2, head_dim=8, dtype=jnp.float32).shape(replicas * (1 + rows), 4))

    def run(pool):
        context = StepContext(positions, metadata, placement)
        return layers.attend(q, k, v, pool, context, spec=AttentionSpec(scale=1.0), rope=Rope())

    assert np.allclose(jax.jit(run)(pool).out, np.repeat(v, 2, axis=1), atol=1e-6)


def test_what_does_not_divide_by_the_replicas_is_refused():
    positions, metadata = attention_inputs(3, 1)
    context = StepContext(positions, metadata, Placement(make_mesh({"data": 2})))
    q, k = jnp.zeros((3, 4, 8)), jnp.zeros((3, 2, 8))
    pool = jnp.zeros(kv_layout("auto", kv_heads=2, head_dim=8, dtype=jnp.float32).shape(4, 4))
    with pytest.raises(ValueError, match="3 tokens, 3 rows and 4 pages must all divide by the 2 replicas"):
        layers.attend(q, k, k, pool, context, spec=AttentionSpec(scale=1.0), rope=Rope())


def test_head_shape():
    assert HeadShape(8, 2, 64).group == 4


@pytest.mark.parametrize("mesh", [{}, pytest.param({"data": 2, "tensor": 2}, marks=pytest.mark.ci)], ids=str)
def test_whole_texts_keep_to_themselves_and_have_a_gradient(mesh):
    """Two rows, the first of two texts; what the first text gives depends on its own values alone, and pools are handed through."""
    positions = jnp.asarray([0, 1, 2, 0, 1, -1, 0, 1, 2, 3, 4, 5], jnp.int32)
    q, k, v = (jnp.asarray(RANDOM.normal(size=(12, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    context, pool = StepContext(positions, layers.Sequences(6), Placement(make_mesh(mesh))), jnp.zeros(())

    def attend(v):
        result = layers.attend(q, k, v, pool, context, spec=AttentionSpec(scale=0.5), rope=Rope())
        assert result.kv is pool
        return result.out[:3].sum(), result.out

    slopes, out = jax.jit(jax.grad(attend, has_aux=True))(v)
    assert np.allclose(out[jnp.asarray([0, 3, 6])], jnp.repeat(v[jnp.asarray([0, 3, 6])], 2, axis=1), atol=1e-6)
    assert np.all(np.abs(slopes[:3]).sum(axis=(1, 2)) > 0) and not np.any(slopes[3:])
    assert np.allclose(slopes.sum(), 3 * 4 * 8, atol=1e-4), "weights of a query sum to 1"
