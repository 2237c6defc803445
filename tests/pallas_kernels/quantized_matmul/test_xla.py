import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import dispatch, tuning
from pallas_kernels.dispatch import Target
from pallas_kernels.quantized_matmul import xla
from pallas_kernels.quantized_matmul.cases import Case


@pytest.mark.parametrize("tokens", [1, 9])
def test_a_token_depends_on_itself_alone(tokens):
    inputs = Case("x", tokens=tokens, features=64, outputs=48).make(0)
    run = jax.jit(xla.quantized_matmul)
    first = run(**inputs)
    other = run(**(inputs | {"x": inputs["x"].at[1:].set(7.0)}))
    assert np.array_equal(first[0], other[0])


def test_sums_are_wide():
    """1 + 256 * 0.001 is lost when sums are kept in bfloat16."""
    x = jnp.full((1, 257), 2.0**-10, jnp.bfloat16).at[0, 0].set(1.0)
    out = jax.jit(xla.quantized_matmul)(x, jnp.ones((1, 257), jnp.int8), jnp.ones((1, 1), jnp.float32))
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0]) == 1.25


@pytest.mark.parametrize("block", [8, 12, 48, 100])
def test_blocks_of_outputs_make_no_difference(block):
    inputs = Case("x", tokens=3, features=32, outputs=48).make(0)
    whole = jax.jit(xla.quantized_matmul)(**inputs)
    with tuning.forced({"outputs": block}):
        blocked = jax.jit(lambda inputs: xla.quantized_matmul(**inputs))(inputs)
    np.testing.assert_allclose(blocked, whole, rtol=1e-5, atol=1e-4)


def test_the_weight_is_never_converted_whole():
    shape = jax.ShapeDtypeStruct
    arguments = shape((1, 512), jnp.float32), shape((8192, 512), jnp.int8), shape((8192, 1), jnp.float32)
    memory = jax.jit(xla.quantized_matmul).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8192 * 512


@pytest.mark.parametrize(("target", "kept"), [(Target("gpu", "NVIDIA H200"), 1), (Target("tpu", "TPU v5 lite"), 0)])
def test_sums_of_integers_are_converted_where_they_are_scaled(target, kept):
    """On GPUs a barrier keeps XLA from joining the conversion to the dot, and so from a kernel of its own for it."""
    arguments = jnp.ones((4, 256), jnp.bfloat16), jnp.ones((128, 256), jnp.int8), jnp.ones((128, 1), jnp.float32)
    with dispatch.assumed(target):
        traced = str(jax.make_jaxpr(lambda *given: xla.quantized_matmul(*given, activations="int8"))(*arguments))
    assert traced.count("optimization_barrier") == kept and "preferred_element_type=int32" in traced


def test_candidates_run_from_the_heuristic():
    key = Case("x", tokens=1, features=384, outputs=8192).tuning_key()
    for platform in ("cpu", "gpu", "tpu"):
        assert xla.heuristic(platform, key) in xla.candidates(platform, key)
    assert xla.heuristic("gpu", key) == {"outputs": 8192}


def test_float8_by_its_bits_is_exact():
    bits = np.arange(256, dtype=np.uint8).reshape(16, 16)
    values = np.where((bits & 0x7F) == 0x7F, 0, bits).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(jax.jit(xla._float8)(jnp.asarray(values.view(np.uint8))), values.astype(np.float32))


@pytest.mark.parametrize("zero", [0, 8])
def test_halves_side_by_side(zero):
    values = jnp.asarray([[0x10, 0xF8], [0x37, 0xA5]], jnp.uint8)
    assert np.array_equal(xla._interleaved(values, zero=zero), np.asarray([[0, 1, 8, 15], [7, 3, 5, 10]]) - zero)
