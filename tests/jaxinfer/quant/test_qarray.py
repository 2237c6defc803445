"""The invariants of a quantised weight, one violation each, and the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.quant.qarray import QArray, QSpec, check, dequantize, relative_error
from jaxinfer.sharding import ArraySpec

GOOD = QArray(jnp.asarray([[[1, -127], [3, 4]], [[0, 5], [6, 127]]], jnp.int8), jnp.asarray([0.5, 2.0], jnp.float32))


def test_dequantize_is_values_times_scales():
    check(GOOD)
    assert np.array_equal(dequantize(GOOD), np.asarray([[[0.5, -63.5], [1.5, 2.0]], [[0, 10], [12, 254]]], np.float32))


@pytest.mark.parametrize(
    ("values", "scales", "words"),
    [
        (jnp.asarray([[-128, 0]], jnp.int8), jnp.ones(1), "-128"),
        (jnp.asarray([[1, 0]], jnp.int8), jnp.ones(2), "leading dimensions"),
        (jnp.asarray([[1, 0]], jnp.int8), jnp.ones((1, 2)), "leading dimensions"),
        (jnp.asarray([[1, 0]], jnp.int8), jnp.zeros(1), "finite and positive"),
        (jnp.asarray([[1, 0]], jnp.int8), jnp.full(1, jnp.nan), "finite and positive"),
        (jnp.asarray([[1, 0]], jnp.int16), jnp.ones(1), "int8 values and float32 scales"),
    ],
)
def test_check_names_what_is_broken(values, scales, words):
    broken = jax.tree.unflatten(jax.tree.structure(GOOD), [values, scales])
    with pytest.raises(ValueError, match=words):
        check(broken)


def test_is_a_pytree_of_values_then_scales():
    leaves, structure = jax.tree.flatten(GOOD)
    assert [leaf.dtype for leaf in leaves] == [jnp.int8, jnp.float32]
    assert jax.tree.map(lambda leaf: leaf.ndim, GOOD).scales == 1  # other things than arrays fit while jax works on it
    assert jax.tree.unflatten(structure, leaves).shape == (2, 2, 2)


def test_a_spec_counts_both_arrays():
    spec = QSpec(ArraySpec((4, 8), np.dtype(np.int8), ("mlp", "embed")), ArraySpec((4,), np.dtype(np.float32), ("mlp",)), "int8")
    assert (spec.nbytes, spec.shape) == (48, (4, 8))


def test_relative_error():
    assert relative_error(GOOD, dequantize(GOOD)) == 0.0
    assert relative_error(GOOD, 2 * dequantize(GOOD)) == pytest.approx(0.5)
