"""Stored weights become an operand of wgmma in registers, without an exchange between threads: the inputs change places instead.

Numbers of 8 bits as `hopper_codes.operand` has it. Of 4 bits a thread reads 8 that follow each other along a row: within 32 inputs place
8 tile + 2 lane + element gets number 8 lane + tile + 4 element, so that a shift and a mask cut both numbers of a pair out of a word.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import hopper, hopper_codes

SPANS = {8: hopper_codes.SPAN, 4: 32}  # bits of a number: inputs that change places among themselves


def bits_of(dtype: Any) -> int:
    """Bits of one number."""
    return 4 if jnp.dtype(dtype) == jnp.int4 else 8


def permute(values: Float[Array, "rows in"], bits: int) -> Float[Array, "rows in"]:
    """Inputs in the order in which `converted` hands over weights of so many bits."""
    rows, inputs = values.shape
    if bits == 8:
        return hopper_codes.permute(values)
    return values.reshape(rows, inputs // 32, 4, 2, 4).transpose((0, 1, 4, 2, 3)).reshape(rows, inputs)


def converted(stored: Any, dtype: Any) -> Any:
    """Weights [64, inputs] in shared memory as `dtype` in registers, in the order of `permute`; 4 bits count from 8."""
    if bits_of(stored.dtype) == 8:
        return hopper_codes.operand(stored, dtype)
    if hopper.interpreting():
        return permute((hopper.load(stored, hopper.WHOLE) ^ jnp.int4(-8)).astype(dtype), 4)
    layout = plgpu.Layout.WGMMA_UPCAST_4X
    made = plgpu.ShapeDtypeStruct(stored.shape, dtype, layout=hopper.WHOLE)
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=made)(_halves)(hopper.load(stored, layout))


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
            found: Any = llvm.inline_asm(word, [low], code, "=r,r")
            pairs[(place[0], 4 * place[1] + tile, *place[2:])] = utils.bitcast(found, pair)
    return mgpu.FragmentedArray(_registers=pairs, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)
