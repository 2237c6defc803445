"""One token as the right side of products on Hopper GPUs, in shared memory like the weight, which is the left side as it is stored.

A product has 64 rows at its left. A tile of a weight has fewer where that deals the weight out more evenly, and is folded then: its inputs
fall into parts that lie below one another, so row `part * rows + r` is that part of the tile's row r. The token falls into the same parts,
each a column or more at the right; of all sums those count where a part of the weight meets the same part of the token (`Fold`).

With weights of the token's own dtype (`Same`) a part is one column. With int8 weights (`Limbs`) the token becomes fixed point of 24 bits,
cut into three int8 numbers, its limbs: x = (limb 0 + 2^8 limb 1 + 2^16 limb 2) * factor; a part is three columns. Sums of those are
integers, so exact in any order, joined in float32. An input is off by less than 2^-23 of the token's largest, or of 2^-100 if that is
larger; a token with an infinity or NaN gives NaN everywhere.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from itertools import product
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import TILE

THREADS, VECTOR = 128, 8  # of a warpgroup; inputs that a thread loads at once
PIECES = (4096, 2048, 1024)  # inputs that are loaded at a time
LIMBS = 3
RANGE = 8355700.0  # what the largest input becomes: three signed bytes hold 8355711, and a quotient is rounded
SHIFT, SHIFT_BITS = 1.5 * 2.0**23, 0x4B400000  # a float32 whose last bit is worth 1, and what it looks like
LEAST = 2.0**-100  # of a token's largest: its factor is no denormal number
MOST_INPUTS = 32768  # sums of limbs stay below 2^31
SWIZZLE, COLUMNS = 128, 8  # bytes and columns of what shared memory keeps together
OWN = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)  # a number for each thread


class Piece(NamedTuple):
    """A part of a token: where it lies, and its numbers in registers."""

    place: Any
    values: Any


class Fold(NamedTuple):
    """How a weight's inputs are folded, and read in blocks of `block`."""

    inputs: int
    parts: int
    block: int

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return TILE // self.parts

    @property
    def part(self) -> int:
        """Inputs of a part."""
        return self.inputs // self.parts

    @property
    def length(self) -> int:
        """Blocks of a part."""
        return self.part // self.block


@runtime_checkable
class RightSide(Protocol):
    """How a token meets a weight. columns: of a part; stored, sums: dtypes of the weight and of what a product adds up."""

    columns: int
    stored: Any
    sums: Any

    def put(self, pieces: Sequence[Piece], fold: Fold, room: Any) -> Any:
        """Write the token, whose numbers have 16 bits, into its `room`; the factor that results are multiplied by."""
        ...

    def joined(self, sums: Sequence[Any]) -> Any:
        """A column's sums each, as one float32."""
        ...


class Limbs:
    """For int8 weights."""

    columns, stored, sums = LIMBS, jnp.int8, jnp.int32

    def put(self, pieces: Sequence[Piece], fold: Fold, room: Any) -> Any:
        """Cut it into limbs."""
        wide = [piece.values.astype(jnp.float32) for piece in pieces]
        top = together(jnp.maximum, jnp.max, [jnp.abs(values) for values in wide])
        largest = jnp.maximum(top, LEAST)
        for piece, values in zip(pieces, wide, strict=True):
            write(fold, room, piece.place, _cut(_fixed(values * (RANGE / largest))))
        plgpu.commit_smem()
        return jnp.where(top < jnp.inf, largest * (1.0 / RANGE), jnp.nan)

    def joined(self, sums: Sequence[Any]) -> Any:
        """Limbs by what they are worth."""
        low, middle, high = (limb.astype(jnp.float32) for limb in sums)
        return low + middle * 2.0**8 + high * 2.0**16


class Same:
    """For weights of the token's dtype."""

    columns, sums = 1, jnp.float32

    def __init__(self, dtype: Any) -> None:
        self.stored = dtype

    def put(self, pieces: Sequence[Piece], fold: Fold, room: Any) -> Any:
        """Write it as it is."""
        for place, values in pieces:
            write(fold, room, place, [values])
        plgpu.commit_smem()
        return jnp.float32(1)

    def joined(self, sums: Sequence[Any]) -> Any:
        """The only one."""
        return sums[0]


def columns_of(side: RightSide, fold: Fold) -> int:
    """Columns of a product, those of all parts and what fills them up."""
    return _filled(side.columns * fold.parts) * COLUMNS


def _filled(columns: int) -> int:
    """How many times `COLUMNS` so many take."""
    return -(-columns // COLUMNS)


def room(side: RightSide, fold: Fold) -> tuple[int, int, int]:
    """Shape of the shared memory (`hopper.swizzled`) for a token: blocks, columns, inputs of a block."""
    return fold.length, columns_of(side, fold), fold.block


def write(fold: Fold, room: Any, place: Any, columns: Sequence[Any]) -> None:
    """Inputs, `strided` in registers, into the columns of their parts; each column of a part has numbers of its own."""
    if hopper.interpreting():
        for begin, size, target in _runs(fold, place):
            for number, values in enumerate(columns):
                room.at[target.block, target.part * len(columns) + number, pl.ds(target.input, size)][...] = values[begin : begin + size]
        return
    layout = strided(place.size)
    bits = jnp.dtype(columns[0].dtype).itemsize * 8
    wanted = plgpu.RefType((plgpu.TilingTransform((COLUMNS, SWIZZLE * 8 // bits)), plgpu.SwizzleTransform(SWIZZLE)))
    plgpu.inline_mgpu(arg_types=(wanted, *([layout] * len(columns))))(partial(_write, fold, place.start, bits // 8))(room, *columns)


class Target(NamedTuple):
    """Where an input lies: its part, and in that which block and which input of it."""

    part: int
    block: int
    input: int


def _runs(fold: Fold, place: Any) -> Iterator[tuple[int, int, Target]]:
    """Inputs of a place that lie side by side in one block: from which one on, how many, and where."""
    at = place.start
    while at < place.start + place.size:
        part, inner = divmod(at, fold.part)
        block, begin = divmod(inner, fold.block)
        size = min(fold.block - begin, place.start + place.size - at)
        yield at - place.start, size, Target(part, block, begin)
        at += size


def _write(fold: Fold, begin: int, size: int, _: Any, room: Any, *columns: Any) -> None:
    """size: bytes of a number. Shared memory keeps 8 columns by 128 bytes together, and of column c 16 bytes at i in place of i xor c.
    Where a register of all threads lies in one part and in whole blocks, a thread's places differ from one to the next by a constant."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    word, byte, vector = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(8), columns[0].layout.vec_size
    step, line, across = THREADS * vector, fold.block * size, _filled(len(columns) * fold.parts)

    def c(value: int) -> Any:
        return utils.c(value, word)

    def offset(along: Any, column: Any) -> Any:
        """Of the byte `along` of a part's column, which may be a number or a constant."""
        block, inner = arith.divui(along, c(line)), arith.remui(along, c(line))
        tile = arith.addi(arith.muli(block, c(across)), arith.divui(column, c(COLUMNS)))
        tile = arith.addi(arith.muli(tile, c(line // SWIZZLE)), arith.divui(inner, c(SWIZZLE)))
        row = arith.andi(column, c(COLUMNS - 1))
        lane = arith.xori(arith.andi(inner, c(SWIZZLE - 1)), arith.shli(row, c(4)))
        return arith.addi(arith.addi(arith.muli(tile, c(COLUMNS * SWIZZLE)), arith.muli(row, c(SWIZZLE))), lane)

    def moved(index: int, number: int) -> Any:
        """Constants alone."""
        part, inside = divmod(begin + index * step, fold.part)
        column = part * len(columns) + number
        tile = (inside * size // line * across + column // COLUMNS) * (line // SWIZZLE)
        return utils.getelementptr(lines[column % COLUMNS], [tile * COLUMNS * SWIZZLE], byte)

    def found(index: int, number: int) -> Any:
        at = arith.addi(own, c(begin + index * step))
        column = arith.addi(arith.muli(arith.divui(at, c(fold.part)), c(len(columns))), c(number))
        return utils.getelementptr(pointer, [offset(arith.muli(arith.remui(at, c(fold.part)), c(size)), column)], byte)

    pointer, own = utils.memref_ptr(room), arith.muli(thread(), c(vector))
    even = fold.part % step == 0 and step * size % line == 0 and begin % step == 0
    rows = range(COLUMNS if even else 0)
    lines = [utils.getelementptr(pointer, [offset(arith.muli(own, c(size)), c(row))], byte) for row in rows]
    for index, number in product(range(columns[0].registers.size), range(len(columns))):
        llvm.store(columns[number].registers.flat[index], (moved if even else found)(index, number))


def meeting(fold: Fold, side: RightSide, sums: Any, first: int, size: int) -> Any:
    """What the products `sums` [64, columns] in shared memory come to for the tile's rows from `first` on, `size` of them: float32, `OWN`,
    again and again. All threads have to have written."""
    if hopper.interpreting():
        found = sums[...].reshape(fold.parts, fold.rows, -1)[:, first : first + size]
        each = [sum(found[part, :, part * side.columns + number] for part in range(fold.parts)) for number in range(side.columns)]
        return jnp.tile(side.joined(each), THREADS // size)
    made = (plgpu.ShapeDtypeStruct((THREADS,), side.sums, layout=OWN),) * side.columns
    met = plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=made)(partial(_met, fold, side.columns, first, size))(sums)
    return side.joined(met)


def _met(fold: Fold, columns: int, first: int, size: int, _: Any, sums: Any) -> tuple[Any, ...]:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    word, kind = ir.IntegerType.get_signless(32), ir.MemRefType(sums.type).element_type
    width, whole = ir.MemRefType(sums.type).shape[1], isinstance(kind, ir.IntegerType)
    add = arith.addi if whole else arith.addf
    row = arith.addi(arith.andi(thread(), utils.c(size - 1, word)), utils.c(first, word))
    begin = utils.getelementptr(utils.memref_ptr(sums), [arith.muli(row, utils.c(width, word))], kind)
    found = []
    for number in range(columns):
        places = [part * fold.rows * width + part * columns + number for part in range(fold.parts)]
        found.append(reduce(add, [llvm.load(kind, utils.getelementptr(begin, [utils.c(place, word)], kind)) for place in places]))
    return tuple(own_number(values, signed=True if whole else None) for values in found)


def own(ref: Any) -> Any:
    """Numbers [n] in memory (n a divisor of 128), one for each thread, again and again, `OWN`."""
    if hopper.interpreting():
        return jnp.tile(ref[...], THREADS // ref.shape[0])

    def load(_: Any, ref: Any) -> Any:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        kind = ir.MemRefType(ref.type)
        place = arith.andi(thread(), utils.c(kind.shape[0] - 1, ir.IntegerType.get_signless(32)))
        return own_number(llvm.load(kind.element_type, utils.getelementptr(utils.memref_ptr(ref), [place], kind.element_type)))

    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((THREADS,), ref.dtype, layout=OWN))(load)(ref)


def leave(ref: Any, values: Any) -> None:
    """Write the numbers [n] of the first n threads, `OWN`."""
    if hopper.interpreting():
        ref[...] = values[: ref.shape[0]]
        return

    def store(_: Any, ref: Any, values: Any) -> None:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm
        from jaxlib.mlir.dialects import vector as vectors

        kind, mine = ir.MemRefType(ref.type), thread()
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, mine, utils.c(kind.shape[0], mine.type))):
            number = vectors.extract(values.registers.flat[0], [], [0])
            llvm.store(number, utils.getelementptr(utils.memref_ptr(ref), [mine], kind.element_type))

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), OWN))(store)(ref, values)


def own_number(value: Any, *, signed: bool | None = None) -> Any:
    """A thread's number as an array, `OWN`."""
    from jax.experimental.mosaic.gpu import fragmented_array as layouts
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector as vectors

    registers = np.array([vectors.from_elements(ir.VectorType.get((1,), value.type), [value])], dtype=object)
    return layouts.FragmentedArray(_registers=registers, _layout=layouts.WGStridedFragLayout((THREADS,), 1), _is_signed=signed)


def thread() -> Any:
    """A thread's number in its warpgroup."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith

    number = utils.thread_idx()
    return arith.andi(number, utils.c(THREADS - 1, number.type))


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
        low, other_low = bytes_chosen(first, second, 0x5140), bytes_chosen(third, fourth, 0x5140)
        upper, other_upper = bytes_chosen(first, second, 0x0062), bytes_chosen(third, fourth, 0x0062)
        found[0].append(less_128(bytes_chosen(low, other_low, 0x5410)))
        found[1].append(less_128(bytes_chosen(low, other_low, 0x7632)))
        found[2].append(less_128(bytes_chosen(upper, other_upper, 0x5410)))
    return found


def bytes_chosen(first: Any, second: Any, which: int) -> Any:
    """Four of the eight bytes of two words; a digit of `which` says which, the last one for the lowest."""
    from jaxlib.mlir.dialects import llvm

    return llvm.inline_asm(first.type, [first, second], f"prmt.b32 $0, $1, $2, {which};", "=r,r,r")


def less_128(word: Any) -> Any:
    """128 less in each byte: the sign turned over."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith

    return arith.xori(word, utils.c(0x80808080 - (1 << 32), word.type))


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
