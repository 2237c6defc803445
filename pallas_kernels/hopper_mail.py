"""Numbers of 16 bits that blocks of threads of a Hopper kernel send each other, and wait for: a number that has not come reads as zero.

They are stored with all bits turned over, so no number is zero: all ones would be, a NaN that no conversion makes (they give 0x7fff). So a
number says by itself that it is there, and neither a fence nor a count has to go to memory and back first. (NCCL's LL protocol sends a flag
beside each word to the same end.) They lie in one half of the room behind a program's counters (`hopper_counters`); a kernel that uses a
half clears the other one, which the next such kernel will use. All blocks of a kernel that waits must run at once.
"""

from collections.abc import Sequence
from functools import partial, reduce
from itertools import groupby
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper_counters
from pallas_kernels.hopper_token import OWN, THREADS, neighbours, strided, thread

MOST = 2 * hopper_counters.HALF  # numbers that a kernel sends at most
LOOKED_AT = 4  # vectors of a thread, at most, that are looked at again and again
CLEARED = 512  # words that a warpgroup clears at once


class Mail(NamedTuple):
    """What a kernel's blocks send each other. half: where the half begins that is this kernel's. All by one warpgroup of each block."""

    counters: Any
    half: Any

    @classmethod
    def of(cls, counters: Any) -> "Mail":
        """A kernel's, in its program's memory."""
        return cls(counters, hopper_counters.ROOM + counters[hopper_counters.TURN] * hopper_counters.HALF)

    def clear(self, worker: Any, workers: int) -> None:
        """Clear this block's share of the other half."""
        other = 2 * hopper_counters.ROOM + hopper_counters.HALF - self.half
        zeros = plgpu.layout_cast(jnp.zeros((CLEARED,), jnp.int32), plgpu.Layout.WG_STRIDED((CLEARED,), vec_size=CLEARED // THREADS))

        def part(index: Any, _: None) -> None:
            self.counters.at[pl.ds(other + (worker + index * workers) * CLEARED, CLEARED)][...] = zeros

        parts = hopper_counters.HALF // CLEARED
        lax.fori_loop(0, lax.div(parts - worker + workers - 1, jnp.int32(workers)), part, None)

    def post(self, first: Any, values: Any, size: int) -> None:
        """Send what the first `size` threads have of values, `OWN`, as the numbers from `first` on (both multiples of 4)."""
        words = self.counters.at[pl.ds(self.half + lax.div(first, jnp.int32(2)), size // 2)]
        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), OWN))(partial(_post, size))(words, values)

    def take(self, first: int, places: Sequence[Any], dtype: Any) -> list[Any]:
        """The numbers of each place among those from `first` on, once they have come, in registers, `strided`. All of one size are waited
        for together."""
        found = []
        for size, group in groupby(places, key=lambda place: place.size):
            alike = list(group)
            words = self.counters.at[pl.ds(self.half + (first + alike[0].start) // 2, size * len(alike) // 2)]
            made = (plgpu.ShapeDtypeStruct((size,), dtype, layout=strided(size)),) * len(alike)
            found += plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=made)(partial(_take, size, len(alike), dtype))(words)
        return found


def _post(size: int, _: Any, words: Any, values: Any) -> None:
    """Of two neighbours the first stores both, as words are what is read."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    mine, word = thread(), ir.IntegerType.get_signless(32)
    number = arith.extui(word, _turned(utils.bitcast(values.registers.flat[0], ir.IntegerType.get_signless(16))))
    pair = arith.ori(number, arith.shli(utils.shfl_bfly(number, 1), utils.c(16, word)))
    first = arith.cmpi(arith.CmpIPredicate.eq, arith.andi(mine, utils.c(1, word)), utils.c(0, word))
    with utils.when(arith.andi(first, arith.cmpi(arith.CmpIPredicate.ult, mine, utils.c(size, word)))):
        pointer = _address(words, arith.shrui(mine, utils.c(1, word)), 4)
        hopper_counters.asm(None, [pointer, pair], "st.relaxed.gpu.global.b32 [$0], $1;", "l,r")


def _turned(number: Any) -> Any:
    """All bits turned over; what would read as nothing (no conversion makes it) becomes another NaN."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith

    found = arith.xori(number, utils.c(-1, number.type))
    absent = arith.cmpi(arith.CmpIPredicate.eq, found, utils.c(0, number.type))
    return arith.select(absent, utils.c(-0x8000, number.type), found)


def _take(size: int, count: int, dtype: Any, _: Any, words: Any) -> tuple[Any, ...]:
    """A thread's numbers. All threads wait for each other first: a slow one may still read what will be overwritten. Of many numbers each
    thread looks at one vector until that has come: looking at all of them takes as much of the memory's time as the weights do."""
    from jax.experimental.mosaic.gpu import fragmented_array as layouts
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith
    from jaxlib.mlir.dialects import vector as vectors

    word, vector = ir.IntegerType.get_signless(32), neighbours(size)
    utils.warpgroup_barrier()
    begin = arith.muli(thread(), utils.c(vector, word))
    places = range(0, size * count, THREADS * vector)
    if len(places) > LOOKED_AT:
        one = arith.muli(arith.remui(thread(), utils.c(len(places), word)), utils.c(THREADS * vector, word))
        _loaded([_address(words, arith.addi(begin, one), 2)], vector)
        utils.warpgroup_barrier()
    pointers = [_address(words, arith.addi(begin, utils.c(at, word)), 2) for at in places]
    registers = np.empty((count, size // THREADS // vector), dtype=object)
    for place, loaded in zip(np.ndindex(registers.shape), _loaded(pointers, vector), strict=True):
        right = [arith.xori(each, utils.c(-1, each.type)) for each in loaded]
        packed = vectors.from_elements(ir.VectorType.get((len(right),), right[0].type), right)
        registers[place] = vectors.bitcast(ir.VectorType.get((vector,), utils.dtype_to_ir_type(dtype)), packed)
    array = partial(layouts.FragmentedArray, _layout=layouts.WGStridedFragLayout((size,), vector), _is_signed=None)
    return tuple(array(_registers=piece) for piece in registers)


def _loaded(pointers: Sequence[Any], vector: int) -> list[list[Any]]:
    """From each pointer `vector` numbers, as words (one number: as a half). All are loaded again until none of them is missing."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, scf

    lanes = max(vector // 2, 1)
    kind = ir.IntegerType.get_signless(min(16 * vector, 32))
    types = [kind] * (lanes * len(pointers))
    loop = scf.WhileOp(types, [utils.c(0, kind) for _ in types])
    with ir.InsertionPoint(loop.before.blocks.append(*types)):
        found = [word for pointer in pointers for word in _load(pointer, lanes, kind)]
        missing = reduce(arith.ori, [_missing(word) for word in found])
        scf.condition(arith.cmpi(arith.CmpIPredicate.ne, missing, utils.c(0, kind)), found)
    after = loop.after.blocks.append(*types)
    with ir.InsertionPoint(after):
        scf.yield_(after.arguments)
    results = list(loop.results)
    return [results[index : index + lanes] for index in range(0, len(results), lanes)]


def _missing(word: Any) -> Any:
    """Not zero if one of the numbers in a word is: of a half that is zero, minus one has the sign that it has not."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir.dialects import arith

    def number(value: int) -> Any:
        return utils.c(value, word.type)

    ones, signs = (1, -0x8000) if word.type.width == 16 else (0x00010001, -0x7FFF8000)
    return arith.andi(arith.andi(arith.subi(word, number(ones)), arith.xori(word, number(-1))), number(signs))


def _load(pointer: Any, lanes: int, kind: Any) -> list[Any]:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    form, letter = ("b16", "h") if kind.width == 16 else ("b32", "r")
    if lanes == 1:
        return [hopper_counters.asm(kind, [pointer], f"ld.relaxed.gpu.global.{form} $0, [$1];", f"={letter},l")]
    names = ", ".join(f"${lane}" for lane in range(lanes))
    code = f"ld.relaxed.gpu.global.v{lanes}.{form} {{{names}}}, [${lanes}];"
    together = ir.Type.parse(f"!llvm.struct<({', '.join([str(kind)] * lanes)})>")
    found = hopper_counters.asm(together, [pointer], code, ",".join([f"={letter}"] * lanes) + ",l")
    return [llvm.extractvalue(kind, found, [lane]) for lane in range(lanes)]


def _address(ref: Any, index: Any, size: int) -> Any:
    """Where the element of so many bytes is."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    return utils.getelementptr(utils.memref_ptr(ref), [index], ir.IntegerType.get_signless(8 * size))
