"""Inputs of a few tokens as two int8 numbers each, their limbs, which meet int8 weights as they are stored, on Hopper GPUs.

A block of a token's inputs becomes fixed point of 16 bits: x = (limb 0 + 2^8 limb 1) * size, with a size of its own. So an input is off by
no more than a 65,000th of the largest in its block, or of 2^-100 if that is larger; bfloat16 itself is off by a 512th of each. Where one
input is 1,000 times the others and its weights are near 0, that is as much as rounding the result is off by (5,000: three times). Sums of a
block are integers, exact in any order; those of a token's two limbs become one float32, times the size, and are added to those of the
blocks before. A block with an infinity or NaN gives NaN.

A token that is cut before, with one size for all its inputs (`quantized_matmul.gpu_cut`), has sums that are integers to the end (`joined`).

Limbs of a token are columns side by side, so one thread has the sums of both. Of a folded weight (`hopper_token.Fold`) a warp's rows are of
one part, so it keeps the columns of that part alone.
"""

from functools import partial, reduce
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import TILE
from pallas_kernels.hopper_grid import WARP, array_of, numbers_of
from pallas_kernels.hopper_token import SWIZZLE, THREADS, Fold, bytes_chosen, less_128, thread

LIMBS, BLOCK = 2, 256  # of an input; inputs of a block
RANGE = 32639.0  # what the largest of a block becomes: limbs are signed
SHIFT = 1.5 * 2.0**23 + 0x80  # a float32 whose last bit is worth 1; its two lowest bytes are limbs, the lowest one plus 128
LEAST, LEAST_BITS, INFINITY_BITS = 2.0**-100, 0x0D800000, 0x7F800000  # of a block's largest
TOGETHER = 4  # tokens whose limbs lie together in shared memory, where their inputs lay: a warp's


def cut(inputs: Any, limbs: Any, sizes: Any) -> None:
    """Blocks of inputs, bfloat16 [rows, 256], a multiple of 4 rows, become limbs [2 * rows, 256] in the same shared memory, as
    `hopper.swizzled` has it, and sizes, float32 [rows]; `plgpu.commit_smem` has to follow."""
    if hopper.interpreting():
        wide = inputs[...].astype(jnp.float32)
        size = jnp.maximum(jnp.max(jnp.abs(wide), axis=1), LEAST) * (1.0 / RANGE)
        fixed = jnp.rint(wide * (1.0 / size)[:, None]).astype(jnp.int32)
        high = (fixed + 0x80) >> 8
        limbs[...] = jnp.stack([fixed - (high << 8), high], axis=1).reshape(limbs.shape).astype(jnp.int8)
        sizes[...] = jnp.where(jnp.isfinite(wide).all(axis=1), size, jnp.nan)
        return
    tiled = plgpu.RefType((plgpu.TilingTransform((8, SWIZZLE)), plgpu.SwizzleTransform(SWIZZLE)))
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), tiled, plgpu.RefType()))(partial(_cut, inputs.shape[0]))(inputs, limbs, sizes)


def _cut(rows: int, _: Any, inputs: Any, limbs: Any, sizes: Any) -> None:
    """A warp takes 4 rows at a time."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith

    pointers, groups = [utils.memref_ptr(ref) for ref in (inputs, limbs, sizes)], rows // TOGETHER
    for begin in range(0, groups, THREADS // WARP):
        group = arith.addi(arith.shrui(thread(), _word(5)), _word(begin))
        if begin + THREADS // WARP <= groups:
            _cut_group(group, *pointers)
            continue
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, group, _word(groups))):
            _cut_group(group, *pointers)


def _cut_group(group: Any, inputs: Any, limbs: Any, sizes: Any) -> None:
    """The 2 KB of 4 rows become two tiles of 8 limbs by 128 bytes; of limb c 16 bytes at i lie in place of i xor c."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm
    from jaxlib.mlir.dialects import vector as vectors

    byte, word, wide = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32), ir.F32Type.get()
    lane, length = arith.andi(thread(), _word(31)), 2 * BLOCK
    first = arith.addi(arith.muli(group, _word(TOGETHER * length)), arith.shli(lane, _word(4)))
    loaded = [
        llvm.load(ir.VectorType.get((4,), word), utils.getelementptr(inputs, [arith.addi(first, _word(row * length))], byte), alignment=16)
        for row in range(TOGETHER)
    ]
    lines = [[vectors.extract(each, [], [index]) for index in range(4)] for each in loaded]
    found = [_size(line) for line in lines]
    llvm.inline_asm(None, [], "bar.warp.sync 0xffffffff;", "~{memory}", has_side_effects=True)  # all have read what is written next
    half = arith.addi(arith.shli(arith.shrui(lane, _word(4)), _word(10)), arith.shli(arith.andi(lane, _word(1)), _word(3)))
    begin = arith.addi(arith.muli(group, _word(TOGETHER * length)), half)
    chunk = arith.shli(arith.andi(lane, _word(14)), _word(3))
    for row, (line, (size, inverse)) in enumerate(zip(lines, found, strict=True)):
        at = arith.addi(arith.muli(group, _word(TOGETHER)), _word(row))
        llvm.store(size, utils.getelementptr(sizes, [at], wide))  # the same by all lanes
        for limb, words in enumerate(_limbs(line, inverse)):
            column = row * LIMBS + limb
            place = arith.addi(arith.addi(begin, _word(column * SWIZZLE)), arith.xori(chunk, _word(column * 16)))
            pair = vectors.from_elements(ir.VectorType.get((2,), word), words)
            llvm.store(pair, utils.getelementptr(limbs, [place], byte), alignment=8)


def _size(line: list[Any]) -> tuple[Any, Any]:
    """Of a row, of which a lane has 8 bfloat16 numbers, and what they are multiplied by. As integers, numbers without signs are in order,
    an infinity and NaN the largest."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    wide = ir.F32Type.get()
    positive = [arith.andi(word, _word(0x7FFF7FFF)) for word in line]
    both = reduce(lambda one, other: _asm("max.u16x2 $0, $1, $2;", one, other), positive)
    mine = arith.maxui(arith.shrui(both, _word(16)), arith.andi(both, _word(0xFFFF)))
    top = arith.maxui(arith.shli(_asm("redux.sync.max.u32 $0, $1, 0xffffffff;", mine), _word(16)), _word(LEAST_BITS))
    size = arith.mulf(utils.bitcast(top, wide), utils.c(1.0 / RANGE, wide))
    inverse = utils.bitcast(_asm("rcp.approx.ftz.f32 $0, $1;", utils.bitcast(size, top.type)), wide)
    finite = arith.cmpi(arith.CmpIPredicate.ult, top, _word(INFINITY_BITS))
    return arith.select(finite, size, utils.c(float("nan"), wide)), inverse


def _limbs(line: list[Any], inverse: Any) -> list[list[Any]]:
    """Of each limb two words for a lane's 8 numbers."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith
    from jaxlib.mlir.dialects import math as maths

    wide, shift, found = ir.F32Type.get(), utils.c(SHIFT, ir.F32Type.get()), [[], []]
    for pair in (line[:2], line[2:]):
        halves = [half for word in pair for half in (arith.shli(word, _word(16)), arith.andi(word, _word(-0x10000)))]
        fixed = [utils.bitcast(maths.fma(utils.bitcast(half, wide), inverse, shift), halves[0].type) for half in halves]
        low, high = bytes_chosen(fixed[0], fixed[1], 0x5140), bytes_chosen(fixed[2], fixed[3], 0x5140)
        found[0].append(less_128(bytes_chosen(low, high, 0x5410)))
        found[1].append(bytes_chosen(low, high, 0x7632))
    return found


def _asm(code: str, *words: Any) -> Any:
    from jaxlib.mlir.dialects import llvm

    return llvm.inline_asm(words[0].type, list(words), code, ",".join(["=r"] + ["r"] * len(words)), has_side_effects="sync" in code)


def _word(value: int) -> Any:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    return utils.c(value, ir.IntegerType.get_signless(32))


def nothing(tokens: int) -> Any:
    """A tile's sums before any block: of so many tokens, for 64 rows each; a thread's numbers one after another."""
    zeros = jnp.zeros((TILE * tokens,), jnp.float32)
    return zeros if hopper.interpreting() else plgpu.layout_cast(zeros, _own(tokens // 2))


def sizes_of(sizes: Any, fold: Fold) -> Any:
    """Sizes [parts * tokens] in shared memory, those that each thread's sums are multiplied by."""
    if hopper.interpreting():
        return sizes[...]
    count = sizes.shape[0] // fold.parts // 4
    made = plgpu.ShapeDtypeStruct((THREADS * count,), jnp.float32, layout=_own(count))
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=made)(partial(_sizes_of, fold, count))(sizes)


def _sizes_of(fold: Fold, count: int, _: Any, sizes: Any) -> Any:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    wide, pointer = ir.F32Type.get(), utils.memref_ptr(sizes)
    first = arith.addi(arith.muli(_part(fold), _word(4 * count)), arith.andi(thread(), _word(3)))
    places = [arith.addi(first, _word(4 * index)) for index in range(count)]
    return array_of([llvm.load(wide, utils.getelementptr(pointer, [place], wide)) for place in places])


def _part(fold: Fold) -> Any:
    """Which part of the weight a warp's rows are of."""
    from jaxlib.mlir.dialects import arith

    return arith.shrui(thread(), _word((THREADS // fold.parts).bit_length() - 1))


def added(total: Any, products: Any, sizes: Any, fold: Fold) -> Any:
    """A tile's sums with the products int32 [64, 2 * parts * tokens] of a block of each part."""
    if hopper.interpreting():
        return total + _worth(products, sizes, fold)
    count = total.shape[0] // THREADS
    arguments = (_own(count), plgpu.Layout.WGMMA, _own(count // 2))
    made = plgpu.ShapeDtypeStruct(total.shape, jnp.float32, layout=_own(count))
    return plgpu.inline_mgpu(arg_types=arguments, return_type=made)(partial(_added, fold, count))(total, products, sizes)


def _worth(products: Any, sizes: Any, fold: Fold) -> Any:
    """In the interpreter."""
    each = products.reshape(fold.parts, fold.rows, fold.parts, -1, LIMBS)
    joined = (each[..., 0] + (each[..., 1] << 8)).astype(jnp.float32) * sizes.reshape(1, 1, fold.parts, -1)
    return jnp.stack([joined[part, :, part] for part in range(fold.parts)]).reshape(-1)


def _added(fold: Fold, count: int, _: Any, total: Any, products: Any, sizes: Any) -> Any:
    """Of 8 columns of products a thread has two side by side, both limbs of a token, in two rows."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith
    from jaxlib.mlir.dialects import math as maths
    from jaxlib.mlir.dialects import vector as vectors

    wide, part, pairs = ir.F32Type.get(), _part(fold), products.registers.reshape(fold.parts, count)
    mine = [arith.cmpi(arith.CmpIPredicate.eq, part, _word(number)) for number in range(1, fold.parts)]
    totals, factors = numbers_of(total), numbers_of(sizes)
    found = []
    for place in range(count):
        limbs = [vectors.extract(pairs[0, place], [], [limb]) for limb in range(LIMBS)]
        for number, chosen in enumerate(mine, 1):
            limbs = [arith.select(chosen, vectors.extract(pairs[number, place], [], [limb]), limbs[limb]) for limb in range(LIMBS)]
        joined = arith.sitofp(wide, arith.addi(limbs[0], arith.shli(limbs[1], _word(8))))
        found.append(maths.fma(joined, factors[place // 2], totals[place]))
    return array_of(found)


def joined(products: Any) -> Any:
    """Products int32 [64, 2 * tokens] of limbs and a tile as a tile's sums, in the limbs' unit."""
    if hopper.interpreting():
        each = products.reshape(-1, LIMBS)
        return each[:, 0].astype(jnp.float32) + each[:, 1].astype(jnp.float32) * 256.0
    count = products.shape[0] * products.shape[1] // LIMBS // THREADS
    made = plgpu.ShapeDtypeStruct((THREADS * count,), jnp.float32, layout=_own(count))
    return plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=made)(_joined)(products)


def _joined(_: Any, products: Any) -> Any:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith
    from jaxlib.mlir.dialects import math as maths
    from jaxlib.mlir.dialects import vector as vectors

    wide, found = ir.F32Type.get(), []
    for pair in products.registers.flat:
        low, high = (arith.sitofp(wide, vectors.extract(pair, [], [limb])) for limb in range(LIMBS))
        found.append(maths.fma(high, utils.c(256.0, wide), low))
    return array_of(found)


def scaled(total: Any, tokens: Any, rows: Any) -> Any:
    """A tile's sums times factors in memory, of tokens and of its rows; where the tile has fewer than 64 rows the rest holds anything."""
    if hopper.interpreting():
        factors = jnp.pad(rows[...], (0, TILE - rows.shape[0]))[:, None] * tokens[...][None]
        return total * factors.reshape(-1)
    count = total.shape[0] // THREADS
    made = plgpu.ShapeDtypeStruct(total.shape, total.dtype, layout=_own(count))
    arguments = (_own(count), plgpu.RefType(), plgpu.RefType())
    return plgpu.inline_mgpu(arg_types=arguments, return_type=made)(partial(_scaled, rows.shape[0]))(total, tokens, rows)


def _scaled(size: int, _: Any, total: Any, tokens: Any, rows: Any) -> Any:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    def load(ref: Any, place: Any) -> Any:
        return llvm.load(ir.F32Type.get(), utils.getelementptr(utils.memref_ptr(ref), [place], ir.F32Type.get()))

    token, row = _first()
    each = [load(rows, arith.minui(arith.addi(row, _word(8 * half)), _word(size - 1))) for half in range(2)]
    numbers, found = numbers_of(total), []
    for place in range(0, len(numbers), 2):
        factor = load(tokens, arith.addi(token, _word(place // 2 * 4)))
        found += [arith.mulf(arith.mulf(numbers[place + half], factor), each[half]) for half in range(2)]
    return array_of(found)


def leave(sums: Any, total: Any, step: int = TILE) -> None:
    """Write a tile's sums to memory [tokens, rows], the first rows if it has fewer than 64, where a token's numbers begin `step` behind
    those of the one before."""
    rows = sums.shape[1]
    if hopper.interpreting():
        sums[...] = total.reshape(TILE, -1).T[:, :rows]
        return
    count = total.shape[0] // THREADS
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _own(count)))(partial(_leave, step, rows))(sums, total)


def _leave(step: int, rows: int, _: Any, sums: Any, total: Any) -> None:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith, llvm

    token, row = _first()
    begin, numbers = arith.addi(arith.muli(token, _word(step)), row), numbers_of(total)

    def store(places: range) -> None:
        for place in places:
            at = arith.addi(begin, _word(place // 2 * 4 * step + place % 2 * 8))
            llvm.store(numbers[place], utils.getelementptr(utils.memref_ptr(sums), [at], numbers[place].type))

    if rows == TILE:
        store(range(len(numbers)))
        return
    for half in range(2):
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, arith.addi(row, _word(8 * half)), _word(rows))):
            store(range(half, len(numbers), 2))


def _first() -> tuple[Any, Any]:
    """Token and row of a thread's first sum; of its others tokens are 4 and rows 8 apart, two rows to a token."""
    from jaxlib.mlir.dialects import arith

    lane = arith.andi(thread(), _word(31))
    row = arith.addi(arith.shli(arith.shrui(thread(), _word(5)), _word(4)), arith.shrui(lane, _word(2)))
    return arith.andi(lane, _word(3)), row


def _own(count: int) -> Any:
    """So many numbers of each thread."""
    return plgpu.Layout.WG_STRIDED((THREADS * count,), vec_size=1)
