import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, hopper_columns
from pallas_kernels.hopper_columns import Room

BLOCKS, KEYS, QUERIES, DIM = 3, 64, 8, 64


def test_attention_of_a_few_queries(interpreted):
    """Blocks of keys enter one after the other; a few keys of the last are not seen."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((QUERIES, DIM), *[(BLOCKS * KEYS, DIM)] * 2))
    seen = BLOCKS * KEYS - 5

    def body(q, k, v, out, scratch):
        own, keys, values, weights, exchange, barrier = scratch
        room = Room(weights, exchange).of(0)
        plgpu.copy_gmem_to_smem(q, own, barrier)
        plgpu.barrier_wait(barrier)

        def absorb(number, state):
            for source, into in ((k, keys), (v, values)):
                plgpu.copy_gmem_to_smem(source.at[pl.ds(number * KEYS, KEYS)], into, barrier)
                plgpu.barrier_wait(barrier)
            scores = hopper_columns.products(keys, own)
            known = hopper.index((KEYS, QUERIES), 0, number * KEYS) < seen
            share, decay, state = hopper_columns.weights(state, jnp.where(known, scores, -jnp.inf), 0.3, room)
            return hopper_columns.weigh(state, share, decay, values, room)

        state = lax.fori_loop(0, BLOCKS, absorb, hopper_columns.start(DIM, KEYS, QUERIES))
        hopper_columns.mean(state, hopper_columns.total(state, room), own)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own, out)
        plgpu.wait_smem_to_gmem(0)

    block = hopper.swizzled((KEYS, DIM), jnp.bfloat16)
    room = Room.scratch(1, (QUERIES, KEYS), jnp.bfloat16, head_dim=DIM)
    scratch = (hopper.swizzled((QUERIES, DIM), jnp.bfloat16), block, block, *room, plgpu.Barrier())
    out = jax.ShapeDtypeStruct((QUERIES, DIM), jnp.bfloat16)
    run = hopper.kernel(body, scratch, out_type=out, grid={"block": 1})
    found = np.asarray(jax.jit(run)(q, k, v), np.float64)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    weights = np.exp2(q @ k[:seen].T * 0.3)
    np.testing.assert_allclose(found, weights @ v[:seen] / weights.sum(1, keepdims=True), atol=0.02)


def test_a_head_of_96_features_is_two_that_overlap():
    assert [(part.start, part.size) for part in hopper_columns.features(96)] == [(0, 64), (32, 64)]
    assert [(part.start, part.size) for part in hopper_columns.features(256)] == [(0, 256)]
