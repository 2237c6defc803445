"""The invariants of a quantised weight, one violation each, and the oracle."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.quant.qarray import (
    FIELDS,
    FP8,
    INT8,
    PACKED,
    QArray,
    check,
    dequantize,
    describe,
    relative_error,
    shape_of,
    stored_shape,
    unpack,
)
from jaxinfer.sharding import ArraySpec, make_mesh, named

P = jax.sharding.PartitionSpec
GOOD = QArray(jnp.asarray([[[1, -127], [3, 4]], [[0, 5], [6, 127]]], jnp.int8), jnp.asarray([[[0.5]], [[2.0]]], jnp.float32))
FOUR = QArray(
    jnp.asarray([[0x10, 0xF8]], jnp.uint8),
    jnp.asarray([[1.0, 0.5]], jnp.bfloat16),
    jnp.asarray([[0, 16]], jnp.uint8),
    jnp.asarray([1.0, 2, 1, 4]),
)


def test_dequantize_is_values_times_scales():
    check(GOOD)
    assert np.array_equal(dequantize(GOOD), np.asarray([[[0.5, -63.5], [1.5, 2.0]], [[0, 10], [12, 254]]], np.float32))


def test_dequantize_of_four_bits_with_everything():
    check(FOUR)
    assert FOUR.shape == (1, 4) and FOUR.blocks == (1, 2) and FOUR.units == (1, 2)
    assert np.array_equal(unpack(FOUR.values), [[0, 1, 8, 15]])
    assert np.array_equal(dequantize(FOUR), [[0, 2, -4, -2]])
    assert np.array_equal(dequantize(replace(FOUR, zeros=None, smooth=None)), [[-8, -7, 0, 3.5]])


def test_columns_go_back_to_their_inputs():
    ordered = replace(FOUR, smooth=None, order=jnp.asarray([2, 0, 3, 1], jnp.int32))
    check(ordered)
    assert np.array_equal(dequantize(replace(ordered, order=None)), [[0, 1, -4, -0.5]])
    assert np.array_equal(dequantize(ordered), [[1, -0.5, 0, -4]])


@pytest.mark.parametrize(
    ("values", "scales", "words"),
    [
        (jnp.asarray([[1, 0]], jnp.int8), jnp.ones(1), "equal blocks"),
        (jnp.asarray([[1, 0]], jnp.int8), jnp.ones((2, 1)), "equal blocks"),
        (jnp.asarray([[1, 0, 0]], jnp.int8), jnp.ones((1, 2)), "equal blocks"),
        (jnp.asarray([[1, 0]], jnp.uint8), jnp.ones((1, 4)), "cut bytes"),
        (jnp.asarray([[1, 0]], jnp.int8), jnp.full((1, 1), -1.0), "finite and not negative"),
        (jnp.asarray([[1, 0]], jnp.int8), jnp.full((1, 1), jnp.nan), "finite and not negative"),
        (jnp.asarray([[1, jnp.nan]], jnp.float8_e4m3fn), jnp.ones((1, 1)), "holds NaN"),
        (jnp.asarray([[1, 0]], jnp.int16), jnp.ones((1, 1)), "found int16 and float32"),
        (jnp.asarray([[1, 0]], jnp.int8), jnp.ones((1, 1), jnp.int32), "found int8 and int32"),
    ],
)
def test_check_names_what_is_broken(values, scales, words):
    with pytest.raises(ValueError, match=words):
        check(QArray.tree_unflatten("float", [values, scales, None, None, None]))


@pytest.mark.parametrize(
    ("good", "change", "words"),
    [
        (GOOD, {"zeros": jnp.zeros((2, 1, 1), jnp.uint8)}, "zeros belong"),
        (FOUR, {"zeros": jnp.full((1, 2), 17, jnp.uint8)}, "zeros belong"),
        (FOUR, {"zeros": jnp.zeros((1, 1), jnp.uint8)}, "zeros belong"),
        (FOUR, {"smooth": jnp.ones(2)}, "smooth is"),
        (GOOD, {"smooth": jnp.asarray([1.0, 0.0])}, "smooth is"),
        (FOUR, {"order": jnp.asarray([1, 0, 3, 2], jnp.int32)}, "comes without smooth"),
        (FOUR, {"smooth": None, "order": jnp.asarray([1, 0, 3, 3], jnp.int32)}, "each input"),
        (FOUR, {"smooth": None, "order": jnp.arange(3, dtype=jnp.int32)}, "each input"),
        (GOOD, {"order": jnp.asarray([1.0, 0.0])}, "order is int32"),
    ],
)
def test_check_looks_at_the_rest(good, change, words):
    leaves = {name: getattr(good, name) for name in FIELDS} | change
    with pytest.raises(ValueError, match=words):
        check(QArray.tree_unflatten("float", list(leaves.values())))


def test_check_knows_what_activations_may_be():
    weight = replace(GOOD)
    object.__setattr__(weight, "activations", "int4")
    with pytest.raises(ValueError, match="activations is 'float' or 'int8', found 'int4'"):
        check(weight)


def test_is_a_pytree_of_what_there_is():
    leaves, structure = jax.tree.flatten(GOOD)
    assert [leaf.dtype for leaf in leaves] == [jnp.int8, jnp.float32]
    assert jax.tree.map(lambda leaf: leaf.ndim, GOOD).scales == 3  # other things than arrays fit while jax works on it
    assert jax.tree.unflatten(structure, leaves).shape == (2, 2, 2)
    assert len(jax.tree.leaves(FOUR)) == 4
    assert jax.tree.structure(GOOD) != jax.tree.structure(replace(GOOD, activations="int8"))


def test_shapes_in_memory():
    assert stored_shape((3, 8), PACKED) == (3, 4) and shape_of((3, 4), PACKED) == (3, 8)
    assert stored_shape((3, 5), INT8) == shape_of((3, 5), INT8) == (3, 5)
    with pytest.raises(ValueError, match="no even last dimension"):
        stored_shape((3, 5), PACKED)


def test_a_description_counts_and_makes_what_there_is():
    weight = ArraySpec((4, 8), np.dtype(np.float32), ("mlp", "embed"))
    spec = describe(weight, 1, (1, 4), PACKED, scheme="int4", extras=("zeros", "smooth"))
    assert [array.shape for array in spec.arrays] == [(4, 4), (4, 2), (4, 2), (8,)]
    assert (spec.nbytes, spec.shape, spec.blocks) == (16 + 32 + 8 + 32, (4, 8), (1, 4))
    made = spec.make([jnp.zeros(array.shape, array.dtype) for array in spec.arrays])
    assert made.smooth is not None and made.shape == spec.shape and made.blocks == spec.blocks
    order = describe(
        ArraySpec((4, 2, 4), np.dtype(np.float32), ("embed", "heads", None)), 2, (1, 1, 4), PACKED, scheme="int4", extras=("order",)
    ).order
    assert order == ArraySpec((8,), np.dtype(np.int32), (None,))
    plain = describe(weight, 1, (1, 8), INT8, scheme="w8a8", activations="int8")
    assert len(plain.arrays) == 2 and plain.make([jnp.zeros((4, 8), jnp.int8), jnp.ones((4, 1))]).activations == "int8"
    with pytest.raises(ValueError, match="cut bytes"):
        describe(weight, 1, (1, 1), PACKED, scheme="int4")


@pytest.mark.parametrize(
    ("blocks", "dtype", "values", "scales"),
    [
        ((1, 96), INT8, P(None, "tensor"), P(None, None)),  # one block for each row: the row may be cut
        ((1, 24), PACKED, P(None, "tensor"), P(None, "tensor")),
        ((1, 32), PACKED, P(None, None), P(None, None)),  # three groups do not go on four devices
        ((8, 48), FP8, P(None, None), P(None, None)),
    ],
)
def test_no_block_is_cut_by_a_mesh(blocks, dtype, values, scales):
    spec = describe(ArraySpec((64, 96), np.dtype(np.float32), ("embed", "mlp")), 1, blocks, dtype, scheme="x")
    mesh = make_mesh({"tensor": 4})
    assert (named(spec.values, mesh).spec, named(spec.scales, mesh).spec) == (values, scales)
    array = spec.make([jax.ShapeDtypeStruct(array.shape, array.dtype) for array in spec.arrays])
    assert array.units == spec.values.units


def test_relative_error():
    assert relative_error(GOOD, dequantize(GOOD)) == 0.0
    assert relative_error(GOOD, 2 * dequantize(GOOD)) == pytest.approx(0.5)
