"""One token as the left side of products on Hopper GPUs, in registers; the weight is the right side, in shared memory as it is stored.

A product has 64 rows and the token is one, so what the others hold is free to choose. With weights of the token's own dtype (`Same`) every
row is the token. With int8 weights (`Limbs`) the token becomes fixed point of 24 bits, cut into three int8 numbers, its limbs:
x = (limb 0 + 2^8 limb 1 + 2^16 limb 2) * factor; row r holds limb r % 4, every fourth is left out of the sums. Those are integers, so exact
in any order, joined in float32. An input is off by less than 2^-23 of the token's largest, or of 2^-100 if that is larger; a token with an
infinity or NaN gives NaN everywhere.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import COLUMNS, TILE, WHOLE

THREADS, VECTOR = 128, 8  # of a warpgroup; inputs that a thread loads at once
PIECES = (4096, 2048, 1024)  # inputs that are loaded at a time
LIMBS, PAD = 3, 16  # rows of limbs, and bytes behind each, so that the rows lie in different banks
PERIOD = 4  # rows of the left side after which limbs begin again; what the last holds does not count
RANGE = 8355700.0  # what the largest input becomes: three signed bytes hold 8355711, and a quotient is rounded
SHIFT, SHIFT_BITS = 1.5 * 2.0**23, 0x4B400000  # a float32 whose last bit is worth 1, and what it looks like
LEAST = 2.0**-100  # of a token's largest: its factor is no denormal number
MOST_INPUTS = 32768  # limbs leave room for three blocks; sums stay below 2^31


class Piece(NamedTuple):
    """A part of a token: where it lies, and its numbers in registers."""

    place: Any
    values: Any


@runtime_checkable
class LeftSide(Protocol):
    """How a token meets a weight. room: shared memory that it is written to once; sums: dtype of what a product adds up."""

    sums: Any

    def room(self, inputs: int) -> Any:
        """The shared memory for so many inputs."""
        ...

    def put(self, pieces: Sequence[Piece], room: Any) -> Any:
        """Write the token, whose numbers have 16 bits; the factor that results are multiplied by."""
        ...

    def taken(self, room: Any, begin: Any, block: int) -> Any:
        """So many inputs from `begin` on, as the left side [64, block] of a product."""
        ...

    def joined(self, sums: Any) -> Any:
        """What a product's rows [64, columns] come to, as float32 [columns]."""
        ...


class Limbs:
    """For int8 weights."""

    sums = jnp.int32

    def room(self, inputs: int) -> Any:
        """Three rows of limbs."""
        return plgpu.SMEM((LIMBS, inputs + PAD), jnp.int8)

    def put(self, pieces: Sequence[Piece], room: Any) -> Any:
        """Cut it into limbs."""
        wide = [piece.values.astype(jnp.float32) for piece in pieces]
        top = together(jnp.maximum, jnp.max, [jnp.abs(values) for values in wide])
        largest = jnp.maximum(top, LEAST)
        for piece, values in zip(pieces, wide, strict=True):
            for limb, found in enumerate(_cut(_fixed(values * (RANGE / largest)))):
                room.at[limb, piece.place][...] = found
        plgpu.commit_smem()
        return jnp.where(top < jnp.inf, largest * (1.0 / RANGE), jnp.nan)

    def taken(self, room: Any, begin: Any, block: int) -> Any:
        """The three limbs and the last once more, again and again."""
        limbs = room.at[:, pl.ds(begin, block)]
        if hopper.interpreting():
            found = limbs[...]
            return jnp.tile(jnp.concatenate([found, found[-1:]]), (TILE // PERIOD, 1))
        made = plgpu.ShapeDtypeStruct((TILE, block), jnp.int8, layout=plgpu.Layout.WGMMA_8BIT)
        return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=made)(partial(_repeated, room.shape[1], block))(limbs)

    def joined(self, sums: Any) -> Any:
        """Limbs by what they are worth."""
        limb = plgpu.broadcasted_iota(jnp.int32, sums.shape, 0, layout=WHOLE) & (PERIOD - 1)
        worth = jnp.where(limb == 0, 1.0, jnp.where(limb == 1, 2.0**8, jnp.where(limb == 2, 2.0**16, 0.0)))
        return _first_rows(sums.astype(jnp.float32) * worth, PERIOD)


class Same:
    """For weights of the token's dtype."""

    sums = jnp.float32

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype

    def room(self, inputs: int) -> Any:
        """The token."""
        return plgpu.SMEM((inputs,), self._dtype)

    def put(self, pieces: Sequence[Piece], room: Any) -> Any:
        """Write it as it is."""
        for place, values in pieces:
            room.at[place][...] = values
        plgpu.commit_smem()
        return jnp.float32(1)

    def taken(self, room: Any, begin: Any, block: int) -> Any:
        """The token in every row."""
        inputs = room.at[pl.ds(begin, block)]
        if hopper.interpreting():
            return jnp.broadcast_to(inputs[...], (TILE, block))
        return lax.broadcast_in_dim(hopper.load(inputs, COLUMNS, coalesced=False), (TILE, block), [1])

    def joined(self, sums: Any) -> Any:
        """Any of the rows."""
        return _first_rows(sums, 1)


def _fixed(values: Any) -> Any:
    """Rounded to integers, plus 0x808080, so that each byte is a limb plus 128. In two steps of 12 bits, since adding 1.5 * 2^23 leaves an
    integer in the bits of a float32, where conversions take four times as long as additions."""
    upper = values * 2.0**-12 + SHIFT
    lower = values - (upper - SHIFT) * 2.0**12 + SHIFT
    high, low = (lax.bitcast_convert_type(part, jnp.int32) for part in (upper, lower))
    return (high << 12) + (low + (0x808080 - SHIFT_BITS))  # the shift drops the upper one's own


def _cut(shifted: Any) -> list[Any]:
    """The three limbs, int8."""
    size = shifted.shape[0]
    vector = neighbours(size)
    if hopper.interpreting() or vector % 4:
        found = [lax.shift_right_logical(shifted, jnp.full_like(shifted, 8 * limb)) ^ 0x80 for limb in range(LIMBS)]
        return [limb.astype(jnp.int8) for limb in found]
    made = (plgpu.ShapeDtypeStruct((size,), jnp.int8, layout=strided(size)),) * LIMBS
    return list(plgpu.inline_mgpu(arg_types=(strided(size),), return_type=made)(partial(_by_words, vector))(shifted))


def _by_words(vector: int, _: Any, shifted: Any) -> tuple[Any, ...]:
    """A register's `vector` numbers become as many bytes of each limb."""
    from jax.experimental.mosaic.gpu import fragmented_array as layouts
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector as vectors

    word, byte = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
    registers = np.empty((LIMBS, *shifted.registers.shape), dtype=object)
    for place in np.ndindex(shifted.registers.shape):
        numbers = [vectors.extract(shifted.registers[place], [], [index]) for index in range(vector)]
        for limb, words in enumerate(_bytes_of_four(numbers)):
            packed = vectors.from_elements(ir.VectorType.get((len(words),), word), words)
            registers[limb, *place] = vectors.bitcast(ir.VectorType.get((vector,), byte), packed)
    return tuple(layouts.FragmentedArray(_registers=each, _layout=shifted.layout, _is_signed=True) for each in registers)


def _bytes_of_four(words: list[Any]) -> list[list[Any]]:
    """Bytes of two in pairs, then pairs."""
    found: list[list[Any]] = [[] for _ in range(LIMBS)]
    for at in range(0, len(words), 4):
        first, second, third, fourth = words[at : at + 4]
        low, other_low = _chosen(first, second, 0x5140), _chosen(third, fourth, 0x5140)
        upper, other_upper = _chosen(first, second, 0x0062), _chosen(third, fourth, 0x0062)
        found[0].append(_less_128(_chosen(low, other_low, 0x5410)))
        found[1].append(_less_128(_chosen(low, other_low, 0x7632)))
        found[2].append(_less_128(_chosen(upper, other_upper, 0x5410)))
    return found


def _chosen(first: Any, second: Any, which: int) -> Any:
    """Four of the eight bytes of two words; a digit of `which` says which, the last one for the lowest."""
    from jaxlib.mlir.dialects import llvm

    return llvm.inline_asm(first.type, [first, second], f"prmt.b32 $0, $1, $2, {which};", "=r,r,r")


def _less_128(word: Any) -> Any:
    """128 less in each byte: the sign turned over."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith

    return arith.xori(word, utils.c(0x80808080 - (1 << 32), word.type))


def _repeated(stride: int, block: int, _: Any, limbs: Any) -> Any:
    """Each thread's 4 neighbours of every 16 inputs: they are the same for all of its rows."""
    from jax.experimental.mosaic.gpu import fragmented_array as layouts
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    word, byte = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8)
    lane = arith.remui(utils.thread_idx(), utils.c(32, word))
    row = arith.andi(arith.shrui(lane, utils.c(2, word)), utils.c(PERIOD - 1, word))
    limb = arith.minui(row, utils.c(LIMBS - 1, word))
    column = arith.shli(arith.andi(lane, utils.c(3, word)), utils.c(2, word))
    begin = arith.addi(arith.muli(limb, utils.c(stride, word)), column)
    loaded = []
    for part in range(block // 16):
        pointer = utils.getelementptr(utils.memref_ptr(limbs), [arith.addi(begin, utils.c(16 * part, word))], byte)
        loaded.append(utils.bitcast(llvm.load(word, pointer), ir.VectorType.get((4,), byte)))
    registers = np.empty(layouts.WGMMA_LAYOUT_8BIT.registers_shape((TILE, block)), dtype=object)
    for place in np.ndindex(registers.shape):
        registers[place] = loaded[place[1]]
    return layouts.FragmentedArray(_registers=registers, _layout=layouts.WGMMA_LAYOUT_8BIT, _is_signed=True)


def _first_rows(sums: Any, count: int) -> Any:
    """The sum of the first `count` rows (1 or 4) of float32 [64, columns], of which all others are repetitions, in every thread."""
    if hopper.interpreting():
        return sums[:count].sum(axis=0)
    made = plgpu.ShapeDtypeStruct((sums.shape[1],), jnp.float32, layout=COLUMNS)
    return plgpu.inline_mgpu(arg_types=(WHOLE,), return_type=made)(partial(_over_lanes, count))(sums)


def _over_lanes(count: int, _: Any, sums: Any) -> Any:
    """Lanes 4 and 8 apart hold neighbouring rows of the same columns."""
    from jax.experimental.mosaic.gpu import fragmented_array as layouts
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith

    registers = np.empty(layouts.WGMMA_COL_LAYOUT.registers_shape((sums.shape[1],)), dtype=object)
    for place in np.ndindex(registers.shape):
        found = sums.registers[(0, place[0], *[0] * (sums.registers.ndim - 2))]
        for distance in (4, 8) if count == PERIOD else ():
            found = arith.addf(found, utils.shfl_bfly(found, distance))
        registers[place] = found
    return layouts.FragmentedArray(_registers=registers, _layout=layouts.WGMMA_COL_LAYOUT, _is_signed=None)


def places_of(inputs: int) -> list[Any]:
    """A token of so many inputs in pieces of one size, and a rest where they are not whole."""
    size = next((size for size in PIECES if inputs % size == 0), PIECES[0])
    whole = inputs - inputs % size
    return [*(pl.ds(begin, size) for begin in range(0, whole, size)), *([pl.ds(whole, inputs - whole)] if whole < inputs else [])]


def pieces_of(token: Any) -> list[Piece]:
    """A token [inputs] in memory, in registers, `strided`."""
    return [Piece(place, hopper.load(token.at[place], strided(place.size))) for place in places_of(token.shape[0])]


def strided(size: int) -> Any:
    """So many numbers in a warpgroup's registers."""
    return plgpu.Layout.WG_STRIDED((size,), vec_size=neighbours(size))


def neighbours(size: int) -> int:
    """How many of so many numbers that lie side by side are one thread's, in `strided`."""
    return math.gcd(size // THREADS, VECTOR)


def together(pair: Callable[[Any, Any], Any], all_of: Callable[[Any], Any], values: Sequence[Any]) -> Any:
    """Arrays reduced to one number; those of one size become one first, since threads have to tell each other what theirs come to."""
    sizes = dict.fromkeys(value.shape[0] for value in values)
    return reduce(pair, [all_of(reduce(pair, [value for value in values if value.shape[0] == size])) for size in sizes])
