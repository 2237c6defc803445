"""8-bit codes (int8, float8_e4m3fn) become bfloat16 on their way to the tensor cores of a Hopper GPU.

Every code is a bfloat16 number exactly: a warpgroup turns blocks of codes in shared memory into tiles that `wgmma` takes, and the scales
multiply what comes out, a key's scale its column of scores, a value's scale its column of weights. Knows no pages and no rows.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import COLUMNS, TILE

PACKED = plgpu.Layout.WGMMA_UPCAST_2X  # how codes lie in registers: four neighbours in each


def unpack(codes: Any, tile: Any) -> None:
    """Codes [keys, head_dim] in shared memory into a tile of bfloat16 there; `plgpu.commit_smem` has to follow."""
    for begin in range(0, codes.shape[0], TILE):
        rows = pl.ds(begin, TILE)
        tile.at[rows][...] = numbers(hopper.load(codes.at[rows], PACKED))


def numbers(codes: Any) -> Any:
    """Codes in registers as bfloat16; float8 goes through float16, the only way before jax 0.12."""
    wide = codes if codes.dtype == jnp.int8 else codes.astype(jnp.float16)
    return wide.astype(jnp.bfloat16)


def move(scales: Any, into: Any) -> None:
    """Copy a block's scales [128 or a multiple] within shared memory."""
    layout = plgpu.Layout.WG_STRIDED(scales.shape, vec_size=scales.shape[0] // 128)
    into[...] = hopper.load(scales, layout)


def columns(scales: Any, shape: tuple[int, int]) -> Any:
    """Scales [keys] in shared memory, one for each column of a tile of scores."""
    return lax.broadcast_in_dim(hopper.load(scales, COLUMNS, coalesced=False), shape, [1])
