"""A model without its weights: a stable order of flat arrays, quantised or not, and the way back."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.config import ConfigError
from jaxinfer.models import llama
from jaxinfer.models.graph import Graph, Quantization, _recipes, arrays_of, random_weights
from jaxinfer.models.weights import transform_of
from jaxinfer.quant.qarray import PACKED, QArray, QSpec, check, dequantize, describe
from jaxinfer.sharding import ArraySpec, make_mesh, named
from tests.driving import GOLDEN, Chunk, Driver, golden_graph, pack

LAYER = [
    "attention.out.weight",
    "attention.qkv.weight",
    "attention_norm.weight",
    "mlp.down.weight",
    "mlp.gate_up.weight",
    "mlp_norm.weight",
]


def tiny(quantization=None, **changes):
    return Graph.of(llama, replace(llama.TINY, **changes), "float32", quantization)


def test_names_stand_in_a_fixed_order():
    layers = [f"layers.{number}.{name}" for number in range(2) for name in LAYER]
    assert list(tiny().names) == ["embedding.weight", *layers, "lm_head.weight", "norm.weight"]
    assert "lm_head.weight" not in tiny(tied_embeddings=True).names
    eleven = [name for name in tiny(layers=11).names if name.endswith("mlp_norm.weight")]
    assert eleven == [f"layers.{number}.mlp_norm.weight" for number in range(11)]


def test_every_name_has_a_transform():
    for name in tiny(attention_bias=True, mlp_bias=True).names:
        transform_of(name, llama.WEIGHTS)


def test_leaves_and_weights_are_inverse():
    for graph in (tiny(layers=1), tiny(Quantization("int8"), layers=1)):
        weights = random_weights(graph, 0, make_mesh({}))
        leaves = graph.leaves(weights)
        assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [(array.shape, array.dtype) for array in graph.arrays]
        again = graph.leaves(graph.weights(leaves))
        assert all(one is two for one, two in zip(leaves, again, strict=True))
        with pytest.raises(ValueError, match=f"has {len(leaves)} arrays, found {len(leaves) - 1}"):
            graph.weights(leaves[1:])


def test_a_random_order_of_columns_is_that_of_the_inputs():
    spec = describe(ArraySpec((4, 8), np.dtype(np.float32), ("mlp", "embed")), 1, (1, 4), PACKED, scheme="int4", extras=("zeros", "order"))
    made = [np.asarray(recipe.fill(jnp.uint32(1))) for recipe in _recipes("a.kernel", spec, 1)]
    assert [it.shape for it in made] == [array.shape for array in spec.arrays] and np.array_equal(made[-1], np.arange(8))


def test_random_weights_are_sharded_and_depend_on_the_seed_alone():
    graph, mesh = tiny(layers=1), make_mesh({"tensor": 4})
    one, four = random_weights(graph, 3, make_mesh({})), random_weights(graph, 3, mesh)
    for name, spec in zip(graph.names, graph.specs, strict=True):
        assert four[name].sharding == named(spec, mesh)
        assert np.array_equal(one[name], four[name])
    assert float(jnp.std(one["layers.0.mlp.down.weight"])) == pytest.approx(96**-0.5, rel=0.05)
    assert np.array_equal(one["norm.weight"], np.ones(64, np.float32))


def test_quantisation_takes_the_matmuls_and_leaves_the_rest():
    graph = tiny(Quantization("int8", (("lm_head", "keep"),)), layers=1, attention_bias=True)
    quantised = {name for name, spec in zip(graph.names, graph.specs, strict=True) if isinstance(spec, QSpec)}
    assert quantised == {f"layers.0.{name}" for name in LAYER if "norm" not in name}
    weights = random_weights(graph, 0, make_mesh({}))
    for name in quantised:
        assert isinstance(weights[name], QArray)
    assert graph.nbytes < tiny(layers=1, attention_bias=True).nbytes
    with pytest.raises(ConfigError, match="'lm_heads' matches no weight"):
        tiny(Quantization("int8", (("lm_heads", "keep"),)))
    with pytest.raises(ConfigError, match=r"--quantize: int4 needs groups.*keep it \(layers.0.mlp.down.weight=keep\)"):
        tiny(Quantization("int4"), intermediate_size=40)


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_random_weights_of_every_scheme(scheme):
    graph = tiny(Quantization(scheme), layers=1)
    weights = random_weights(graph, 0, make_mesh({"tensor": 2}))
    for name, spec in zip(graph.names, graph.specs, strict=True):
        if isinstance(spec, QSpec):
            check(weights[name])
            into = math.prod(spec.shape[-graph.contracting[graph.names.index(name)] :])
            assert float(jnp.std(jax.jit(dequantize)(weights[name]))) == pytest.approx(into**-0.5, rel=0.1)


def test_arrays_of_a_weight():
    graph = tiny(Quantization("int8"), layers=1)
    down = graph.specs[graph.names.index("layers.0.mlp.down.weight")]
    assert [array.axes for array in arrays_of(down)] == [("embed", "mlp"), ("embed", None)]
    assert arrays_of(graph.specs[0]) == (ArraySpec((128, 64), np.dtype(np.float32), ("vocab", "embed")),)
    assert sum(array.nbytes for array in graph.arrays) == graph.nbytes


def test_binding_costs_nothing_at_run_time_and_little_when_traced():
    graph = tiny(layers=32)
    leaves = graph.structs(make_mesh({}))
    jaxpr = jax.make_jaxpr(lambda leaves: graph.bind(leaves).norm.weight.get_value())(leaves)
    assert len(jaxpr.eqns) == 0 and len(jaxpr.jaxpr.invars) == len(leaves) == 6 * 32 + 3


def test_kv_specs_come_from_the_attention_ops_layout():
    specs = golden_graph("grouped").kv_specs(10, 4)
    assert len(specs) == 3 and specs[0].axes[:2] == ("pages", "kv_heads")
    assert specs[0].nbytes == 10 * 2 * 2 * 4 * 8 * 4
    assert golden_graph("grouped", "bfloat16").kv_specs(10, 4)[0].dtype == jnp.bfloat16
    quantised = golden_graph("grouped").kv_specs(10, 4, codes="int8")
    assert [spec.nbytes for spec in jax.tree.leaves(quantised)[:2]] == [10 * 2 * 2 * 4 * 8, 10 * 2 * 2 * 4 * 4]


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.05), ("w8a8", 0.1), ("int4", 0.5)])
def test_a_quantised_model_runs_and_stays_near(scheme, most):
    """Model files do not know about quantisation; logits move little, here with weights and scales sharded."""
    with np.load(GOLDEN / "linear" / "expected.npz") as file:
        tokens, lengths, exact = file["tokens"], file["lengths"], file["logits"]
    prompts = [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    near = Driver.golden("linear", make_mesh({"tensor": 2}), quantization=Quantization(scheme)).logits(prompts, [lengths.tolist()])
    assert 1e-5 < np.sqrt(np.mean((np.concatenate(near) - exact) ** 2)) / np.std(exact) < most


def test_a_program_takes_flat_arrays():
    graph, mesh = tiny(layers=1), make_mesh({})
    driver = Driver(graph, graph.leaves(random_weights(graph, 0, mesh)), mesh)
    step = pack([Chunk(0, (1, 2, 3))], 1, decode=False)
    lowered = driver.run.lower(graph.structs(mesh), driver.pool(1), step.tokens, step.positions, step.metadata)
    assert len(jax.tree.leaves(lowered.args_info[0][0])) == len(graph.arrays)
