import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, hopper_codes

KEYS, DIM = 128, 64


def convert(dtype):
    """One warpgroup that unpacks a block, moves its scales and multiplies by them."""

    def body(codes, scales, out, scaled, scratch):
        packed, tile, given, moved, columns, barrier = scratch
        plgpu.copy_gmem_to_smem(codes, packed, barrier)
        plgpu.copy_gmem_to_smem(scales, given, barrier)
        plgpu.barrier_wait(barrier)
        hopper_codes.unpack(packed, tile)
        hopper_codes.move(given, moved)
        plgpu.commit_smem()
        columns[...] = hopper_codes.columns(moved, (hopper.TILE, KEYS)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out)
        plgpu.copy_smem_to_gmem(columns, scaled)
        plgpu.wait_smem_to_gmem(0)

    scratch = (
        hopper.swizzled((KEYS, DIM), dtype),
        hopper.swizzled((KEYS, DIM), jnp.bfloat16),
        plgpu.SMEM((KEYS,), jnp.float32),
        plgpu.SMEM((KEYS,), jnp.float32),
        hopper.swizzled((hopper.TILE, KEYS), jnp.bfloat16),
        plgpu.Barrier(num_arrivals=2),
    )
    out = jax.ShapeDtypeStruct((KEYS, DIM), jnp.bfloat16), jax.ShapeDtypeStruct((hopper.TILE, KEYS), jnp.bfloat16)
    return hopper.kernel(body, scratch, out_type=out, grid={"block": 1})


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_codes_become_the_same_numbers(interpreted, dtype):
    """Every code there is; scales stand in the columns."""
    codes = jax.lax.bitcast_convert_type(jnp.arange(KEYS * DIM).astype(jnp.uint8).reshape(KEYS, DIM), jnp.dtype(dtype))
    scales = jnp.asarray(np.random.default_rng(0).standard_normal(KEYS, np.float32))
    found, columns = convert(jnp.dtype(dtype))(codes, scales)
    assert np.array_equal(np.asarray(found, np.float32), np.asarray(codes, np.float32), equal_nan=True)
    assert np.array_equal(columns, jnp.broadcast_to(scales.astype(jnp.bfloat16)[None], columns.shape))
