"""8-bit codes (int8, float8_e4m3fn) become bfloat16 on their way to the tensor cores of a Hopper GPU.

Every code is a bfloat16 number exactly, and the scales multiply what comes out, a key's scale its scores, a value's scale its weights.
`unpack` turns blocks of codes in shared memory into tiles there that `wgmma` takes on either side. `operand` makes the left side of a
product in registers, without an exchange between threads: a thread reads 4 codes that follow each other along a row, wgmma wants pairs
from it that lie further apart. A sum does not depend on the order of its terms, so the pairs are handed over as they are and the other
side is brought into the same order first (`permute`). Knows no pages and no rows.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Shaped

from pallas_kernels import hopper
from pallas_kernels.hopper import COLUMNS, TILE

PACKED = plgpu.Layout.WGMMA_UPCAST_2X  # how codes lie in registers: four neighbours in each
SPAN = 16  # numbers that change places among themselves


def unpack(codes: Any, tile: Any) -> None:
    """Codes [keys, head_dim] in shared memory into a tile of bfloat16 there; `plgpu.commit_smem` has to follow."""
    for begin in range(0, codes.shape[0], TILE):
        rows = pl.ds(begin, TILE)
        tile.at[rows][...] = numbers(hopper.load(codes.at[rows], PACKED))


def numbers(codes: Any, dtype: Any = jnp.bfloat16) -> Any:
    """Codes in registers as numbers; float8 goes through float16, the only way before jax 0.12."""
    wide = codes if codes.dtype == jnp.int8 else codes.astype(jnp.float16)
    return wide.astype(dtype)


def permute(values: Shaped[Array, "*rows in"]) -> Shaped[Array, "*rows in"]:
    """Numbers in the order in which `operand` hands over codes: of 16, place 8 tile + 2 lane + element gets 4 lane + 2 tile + element."""
    *rows, inputs = values.shape
    return values.reshape(*rows, inputs // SPAN, 4, 2, 2).swapaxes(-3, -2).reshape(values.shape)


def operand(stored: Any, dtype: Any) -> Any:
    """Codes [64, inputs] in shared memory as numbers in registers, the left side of a product, in the order of `permute`."""
    if hopper.interpreting():
        return permute(numbers(hopper.load(stored, hopper.WHOLE), dtype))
    loaded = plgpu.Layout.WGMMA_8BIT
    made = plgpu.ShapeDtypeStruct(stored.shape, dtype, layout=hopper.WHOLE)
    return plgpu.inline_mgpu(arg_types=(loaded,), return_type=made)(_pairs)(numbers(hopper.load(stored, loaded), dtype))


def _pairs(_: Any, values: Any) -> Any:
    """Each thread's 4 numbers as the pairs of two neighbouring tiles."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils

    pairs = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(values.shape), dtype=object)
    for place, register in np.ndenumerate(values.registers):
        for tile in range(2):
            pairs[(place[0], 2 * place[1] + tile, *place[2:])] = utils.vector_slice(register, slice(2 * tile, 2 * tile + 2))
    return mgpu.FragmentedArray(_registers=pairs, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def move(scales: Any, into: Any) -> None:
    """Copy a block's scales [128 or a multiple] within shared memory."""
    layout = plgpu.Layout.WG_STRIDED(scales.shape, vec_size=scales.shape[0] // 128)
    into[...] = hopper.load(scales, layout)


def columns(scales: Any, shape: tuple[int, int]) -> Any:
    """Scales [keys] in shared memory, one for each column of a tile of scores."""
    return lax.broadcast_in_dim(hopper.load(scales, COLUMNS, coalesced=False), shape, [1])
