from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.attention import AttentionSpec

KEYS, DIM = 128, 64


def test_interpretation_holds_inside_only():
    assert not hopper.interpreting()
    assert hopper.interpretation() is None
    assert hopper.spill(2, 64, jnp.bfloat16) == ()
    with hopper.interpreted():
        assert hopper.interpreting()
        assert hopper.cores() == 2
        assert len(hopper.spill(2, 64, jnp.bfloat16)) == 1
    assert not hopper.interpreting()


def test_cores_are_those_of_the_described_chip():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",)).abstract_mesh
    device = type(mesh.abstract_device)(device_kind="NVIDIA H20", num_cores=78, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names, abstract_device=device)):
        assert hopper.cores() == 78


def attend(spec, floor, stop):
    """One warpgroup, one block of keys: a kernel of the shared parts alone."""

    def body(q, kv, out, scratch):
        q_shared, kv_shared, barrier, spilled = scratch
        plgpu.copy_gmem_to_smem(q, q_shared, barrier)
        plgpu.copy_gmem_to_smem(kv, kv_shared, barrier)
        plgpu.barrier_wait(barrier)
        keys, values = kv_shared.at[0], kv_shared.at[1]
        scores, factor = hopper.shape_scores(hopper.products(q_shared, keys), spec)
        key = hopper.index((hopper.TILE, KEYS), 1, 0)
        state = hopper.start(DIM)
        share, decay, state = hopper.weights(state, jnp.where((key < stop) & (key >= floor), scores, -jnp.inf), factor)
        hopper.clear(values, 0, jnp.int32(floor), jnp.int32(stop))
        weighted = state.weighted * hopper.spread(decay, state.weighted.shape)
        weighted = hopper.weigh(weighted, share.astype(q.dtype), values, spilled.at[0])
        q_shared[...] = (weighted / hopper.spread(state.total, weighted.shape)).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_shared, out)
        plgpu.wait_smem_to_gmem(0)

    scratch = (
        hopper.swizzled((hopper.TILE, DIM), jnp.bfloat16),
        hopper.swizzled((2, KEYS, DIM), jnp.bfloat16),
        plgpu.Barrier(num_arrivals=2),
        *hopper.spill(1, KEYS, jnp.bfloat16),
    )
    out = jax.ShapeDtypeStruct((hopper.TILE, DIM), jnp.bfloat16)
    return hopper.kernel(body, scratch, out_type=out, grid={"block": 1})


@pytest.mark.parametrize(("soft_cap", "floor", "stop"), [(None, 0, KEYS), (3.0, 70, 101)])
def test_a_block_of_keys(interpreted, soft_cap, floor, stop):
    rng = np.random.default_rng(0)
    q, kv = (jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16) for shape in ((64, DIM), (2, KEYS, DIM)))
    kv = kv.at[:, stop:].set(jnp.nan).at[:, :floor].set(jnp.nan)
    spec = AttentionSpec(0.2, soft_cap=soft_cap)
    found = np.asarray(attend(spec, floor, stop)(q, kv), np.float64)
    q, keys, values = (np.asarray(x, np.float64) for x in (q, kv[0, floor:stop], kv[1, floor:stop]))
    scores = q @ keys.T * 0.2
    weights = np.exp(scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap))
    np.testing.assert_allclose(found, weights @ values / weights.sum(1, keepdims=True), atol=0.02)


def test_the_runtime_is_started_by_a_kernel(interpreted):
    hopper.start_runtime()
    numbers = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
    np.testing.assert_array_equal(np.asarray(hopper.smallest()(numbers)), numbers)


@pytest.mark.parametrize(
    ("registers", "good"), [((208, 208, 40, 40), True), ((96, 96, 80, 80, 80, 80), False), ((96, 96, 72, 72, 72, 72), True)]
)
def test_warpgroups_ask_for_no_more_registers_than_there_are(registers, good):
    def made():
        return hopper.kernel(print, (), out_type=(), grid={"block": 1}, registers=registers)

    if good:
        assert made() is not None
        return
    with pytest.raises(ValueError, match="6 warpgroups ask for 512 registers a thread in all, and begin with 480"):
        made()


def test_kernels_are_called_by_their_modules():
    """By profiles, whatever their bodies are."""
    seen = []
    body = hopper.named(partial(seen.append), "pallas_kernels.residual_norm.gpu")
    body("ref")
    assert body.__name__ == "residual_norm_gpu" and seen == ["ref"]
