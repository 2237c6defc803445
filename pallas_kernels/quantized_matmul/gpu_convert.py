"""Stored weights become an operand of wgmma in registers, without an exchange between threads: the inputs change places instead.

A thread reads 4 or 8 numbers that follow each other along a row, wgmma wants pairs from it that lie further apart. A sum does not depend
on the order of its terms, so the pairs are handed over as they are and the inputs are brought into the same order first (`permute`):
within 16 inputs (8 bits) place 8 tile + 2 lane + element gets number 4 lane + 2 tile + element; within 32 (4 bits) it gets number
8 lane + tile + 4 element, so that a shift and a mask cut both numbers of a pair out of a word at once.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import hopper

SPANS = {8: 16, 4: 32}  # bits of a number: inputs that change places among themselves


def bits_of(dtype: Any) -> int:
    """Bits of one number."""
    return 4 if jnp.dtype(dtype) == jnp.int4 else 8


def permute(values: Float[Array, "rows in"], bits: int) -> Float[Array, "rows in"]:
    """Inputs in the order in which `converted` hands over weights of so many bits."""
    rows, inputs = values.shape
    if bits == 8:
        return values.reshape(rows, inputs // 16, 4, 2, 2).transpose((0, 1, 3, 2, 4)).reshape(rows, inputs)
    return values.reshape(rows, inputs // 32, 4, 2, 4).transpose((0, 1, 4, 2, 3)).reshape(rows, inputs)


def converted(stored: Any, dtype: Any) -> Any:
    """Weights [64, inputs] in shared memory as `dtype` in registers, in the order of `permute`; 4 bits count from 8."""
    bits = bits_of(stored.dtype)
    if hopper.interpreting():
        found = hopper.load(stored, hopper.WHOLE)
        return permute((found ^ jnp.int4(-8) if bits == 4 else found).astype(dtype), bits)
    layout = plgpu.Layout.WGMMA_8BIT if bits == 8 else plgpu.Layout.WGMMA_UPCAST_4X
    made = plgpu.ShapeDtypeStruct(stored.shape, dtype, layout=hopper.WHOLE)
    run = plgpu.inline_mgpu(arg_types=(layout,), return_type=made)(_bytes if bits == 8 else _halves)
    return run(hopper.load(stored, layout))


def _bytes(_: Any, values: Any) -> Any:
    """Each thread's 4 numbers, widened, as the pairs of two neighbouring tiles."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    wide = values.astype(ir.F16Type.get() if isinstance(values.mlir_dtype, ir.Float8E4M3FNType) else ir.BF16Type.get())
    pairs = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(values.shape), dtype=object)
    for place, register in np.ndenumerate(wide.registers):
        for tile in range(2):
            pairs[(place[0], 2 * place[1] + tile, *place[2:])] = utils.vector_slice(register, slice(2 * tile, 2 * tile + 2))
    return mgpu.FragmentedArray(_registers=pairs, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


def _halves(_: Any, values: Any) -> Any:
    """Each thread's 8 numbers as the pairs of four neighbouring tiles: put in the low bits of bfloat16's 128, less 136."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    word, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
    code = "{ .reg .b32 s<2>; lop3.b32 s0, $1, 0x000F000F, 0x43004300, 0xEA; mov.b32 s1, 0x43084308; sub.bf16x2 $0, s0, s1; }"
    pairs = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(values.shape), dtype=object)
    for place, register in np.ndenumerate(values.registers):
        bits = utils.bitcast(register, word)
        for tile in range(4):
            low = arith.shrui(bits, utils.c(4 * tile, word)) if tile else bits
            found = llvm.inline_asm(word, [low], code, "=r,r")
            pairs[(place[0], 4 * place[1] + tile, *place[2:])] = utils.bitcast(found, pair)
    return mgpu.FragmentedArray(_registers=pairs, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)
