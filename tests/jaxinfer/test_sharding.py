"""Descriptions become shardings: what divides is sharded, what does not is replicated, nothing is sharded twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfer.sharding import ArraySpec, Rules, constrain, device_bytes, make_mesh, named, partition, struct, zeros


def test_a_mesh_always_has_both_axes():
    assert dict(make_mesh({}).shape) == {"data": 1, "tensor": 1}
    mesh = make_mesh({"data": 2, "tensor": 4})
    assert dict(mesh.shape) == {"data": 2, "tensor": 4}
    assert mesh.devices.ravel().tolist() == jax.devices()[:8]
    assert make_mesh({"tensor": 2}, jax.devices()[4:]).devices.ravel().tolist() == jax.devices()[4:6]


@pytest.mark.parametrize(
    ("axes", "words"),
    [({"model": 2}, "'model' is unknown"), ({"data": 0}, "at least 1"), ({"data": 4, "tensor": 4}, "needs 16 devices, found 8")],
)
def test_a_mesh_that_cannot_be_is_refused(axes, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(axes)


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((8, 6, 64), ("kv_heads", None, "embed"), P("tensor", None, None)),
        ((2, 6, 64), ("kv_heads", None, "embed"), P(None, None, None)),  # 2 heads over 4 devices
        ((16, 8), ("tokens", "mlp"), P("data", "tensor")),
        ((8, 8), ("heads", "mlp"), P("tensor", None)),  # an axis of the mesh shards one dimension
        ((7, 8), ("rows", "vocab"), P(None, "tensor")),
        ((), (), P()),
    ],
)
def test_partition(shape, axes, expected):
    assert partition(shape, axes, make_mesh({"data": 2, "tensor": 4})) == expected


def test_axes_of_size_one_are_named_all_the_same():
    assert partition((3, 5), ("tokens", "mlp"), make_mesh({})) == P("data", "tensor")


def test_an_axis_that_no_rule_names_is_an_error():
    with pytest.raises(KeyError, match="kv_head"):
        partition((8,), ("kv_head",), make_mesh({}))


def test_other_rules():
    assert partition((8, 8), ("vocab", "mlp"), make_mesh({"tensor": 2}), Rules((("vocab", None), ("mlp", "tensor")))) == P(None, "tensor")


def test_a_spec_knows_its_size_and_its_share():
    spec, mesh = ArraySpec((8, 6), jnp.dtype(jnp.bfloat16), ("mlp", "embed")), make_mesh({"data": 2, "tensor": 4})
    assert spec.nbytes == 96
    assert device_bytes(spec, mesh) == 24
    assert struct(spec, mesh).sharding == named(spec, mesh)
    assert hash(spec) == hash(ArraySpec((8, 6), np.dtype("bfloat16"), ("mlp", "embed")))
    with pytest.raises(ValueError, match="differ in length"):
        ArraySpec((8, 6), np.dtype(np.int8), ("mlp",))


def test_zeros_are_made_where_they_belong():
    mesh = make_mesh({"data": 2, "tensor": 4})
    made = zeros(ArraySpec((4, 8), np.dtype(np.float32), ("pages", "kv_heads")), mesh)
    assert made.sharding.spec == P("data", "tensor") and made.addressable_shards[0].data.shape == (2, 2)
    assert not np.asarray(made).any()


def test_constrain():
    x = jnp.ones((4, 8))
    assert constrain(x, ("tokens", "mlp"), make_mesh({})) is x
    mesh = make_mesh({"data": 2, "tensor": 4})
    assert jax.jit(lambda x: constrain(x, ("tokens", "mlp"), mesh))(x).sharding.spec == P("data", "tensor")


def test_a_grain_is_not_cut():
    spec = ArraySpec((8, 12), np.dtype(np.int8), ("embed", "mlp"), (1, 4))
    assert spec.units == (8, 3)
    assert named(spec, make_mesh({"tensor": 4})).spec == P(None, None)
    assert named(spec, make_mesh({"tensor": 3})).spec == P(None, "tensor")
    with pytest.raises(ValueError, match="not a multiple of grain"):
        ArraySpec((8, 12), np.dtype(np.int8), ("embed", "mlp"), (1, 5))
