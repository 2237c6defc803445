"""Numbers of a few tokens, for some rows of a weight each, in a warpgroup's registers on Hopper GPUs, in the order of what is written.

Products lie in registers as wgmma leaves them. Results are written token by token, rows side by side. So sums go through shared memory,
and each thread takes up numbers of rows that lie side by side for its neighbours (`Grid`). Knows no links.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import TILE
from pallas_kernels.hopper_token import THREADS, Fold, thread

WARP = 32  # threads


class Grid(NamedTuple):
    """Numbers of so many tokens, for so many rows each, of a warpgroup's threads: thread t has those of places t, t + 128, ..., where a
    token's rows lie side by side. Both are powers of two."""

    tokens: int
    rows: int

    @property
    def layout(self) -> Any:
        """Of a flat array of all numbers."""
        return plgpu.Layout.WG_STRIDED((self.tokens * self.rows,), vec_size=1)

    def made(self, dtype: Any) -> Any:
        """What is loaded."""
        return plgpu.ShapeDtypeStruct((self.tokens * self.rows,), dtype, layout=self.layout)

    def load(self, ref: Any, strides: tuple[int, int] | None = None) -> Any:
        """A reference [tokens, rows], or with strides of a token and of a row."""
        if hopper.interpreting():
            return self._interpreted(ref, strides)

        def load(_: Any, ref: Any) -> Any:
            from jaxlib.mlir import ir
            from jaxlib.mlir.dialects import llvm

            kind = ir.MemRefType(ref.type).element_type
            return array_of([llvm.load(kind, pointer) for pointer in self.pointers(ref, strides)])

        return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=self.made(ref.dtype))(load)(ref)

    def _interpreted(self, ref: Any, strides: tuple[int, int] | None) -> Any:
        values = ref[...]
        if strides is not None:
            values = jnp.broadcast_to(values[: self.tokens, None] if strides[0] else values[None], (self.tokens, self.rows))
        return values.reshape(-1)

    def store(self, ref: Any, values: Any) -> None:
        """Write a reference [tokens, rows]."""
        if hopper.interpreting():
            ref[...] = values.reshape(self.tokens, self.rows)
            return

        def store(_: Any, ref: Any, values: Any) -> None:
            from jaxlib.mlir.dialects import llvm

            for number, pointer in zip(numbers_of(values), self.pointers(ref, None), strict=True):
                llvm.store(number, pointer)

        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.layout))(store)(ref, values)

    def store_sums(self, ref: Any, values: Any) -> None:
        """Write each token's sum over its rows, over 32 at a time if there are more, float32 [tokens] behind one another; not in the
        interpreter."""

        def store(_: Any, ref: Any, values: Any) -> None:
            from jax.experimental.mosaic.gpu import utils
            from jaxlib.mlir.dialects import arith, llvm

            word = thread().type
            for place, number in enumerate(numbers_of(values)):
                total = number
                for shift in range(min(self.rows, WARP).bit_length() - 1):
                    total = arith.addf(total, utils.shfl_bfly(total, 1 << shift))
                token, row = self.place(place)
                at = arith.addi(arith.muli(arith.divui(row, utils.c(WARP, word)), utils.c(self.tokens, word)), token)
                with utils.when(arith.cmpi(arith.CmpIPredicate.eq, arith.remui(row, utils.c(WARP, word)), utils.c(0, word))):
                    llvm.store(total, utils.getelementptr(utils.memref_ptr(ref), [at], total.type))

        plgpu.inline_mgpu(arg_types=(plgpu.RefType(), self.layout))(store)(ref, values)

    def place(self, index: int) -> tuple[Any, Any]:
        """Token and row of a thread's number."""
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir.dialects import arith

        at = arith.addi(thread(), utils.c(index * THREADS, thread().type))
        return arith.divui(at, utils.c(self.rows, at.type)), arith.remui(at, utils.c(self.rows, at.type))

    def pointers(self, ref: Any, strides: tuple[int, int] | None) -> list[Any]:
        """Where a thread's numbers are."""
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        kind = ir.MemRefType(ref.type)
        steps = strides or tuple(kind.get_strides_and_offset()[0])
        found = []
        for index in range(self.tokens * self.rows // THREADS):
            token, row = self.place(index)
            at = arith.addi(arith.muli(token, utils.c(steps[0], token.type)), arith.muli(row, utils.c(steps[1], row.type)))
            found.append(utils.getelementptr(utils.memref_ptr(ref), [at], kind.element_type))
        return found


def numbers_of(values: Any) -> list[Any]:
    """A thread's numbers of an array."""
    from jaxlib.mlir.dialects import vector as vectors

    return [vectors.extract(each, [], [0]) for each in values.registers.flat]


def array_of(numbers: Sequence[Any]) -> Any:
    """A thread's numbers, one after another, as an array."""
    from jax.experimental.mosaic.gpu import fragmented_array as layouts
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector as vectors

    registers = np.array([vectors.from_elements(ir.VectorType.get((1,), each.type), [each]) for each in numbers], dtype=object)
    layout = layouts.WGStridedFragLayout((len(numbers) * THREADS,), 1)
    return layouts.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def met(fold: Fold, grid: Grid, sums: Any, first: int) -> Any:
    """What the products `sums` [columns, 64] in shared memory come to for the tile's rows from `first` on, float32. As many columns as
    tokens: only those are there where a part of the weight has met the same part of the token."""
    columns = [min(part, sums.shape[0] // grid.tokens - 1) for part in range(fold.parts)]
    if hopper.interpreting():
        whole = sums[...].reshape(-1, grid.tokens, fold.parts, fold.rows)
        return reduce(jnp.add, [whole[at, :, part, first : first + grid.rows] for part, at in enumerate(columns)]).reshape(-1)

    def load(_: Any, sums: Any) -> Any:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        kind = ir.MemRefType(sums.type)
        found = []
        for pointer in grid.pointers(sums, (TILE, 1)):
            places = [at * grid.tokens * TILE + part * fold.rows + first for part, at in enumerate(columns)]
            offsets = [utils.c(place, ir.IntegerType.get_signless(32)) for place in places]
            each = [llvm.load(kind.element_type, utils.getelementptr(pointer, [at], kind.element_type)) for at in offsets]
            found.append(reduce(arith.addf, each))
        return array_of(found)

    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=grid.made(jnp.float32))(load)(sums)


def roots(squares: Any, partial: Any, factors: Any, inputs: int, epsilon: float) -> None:
    """What the root mean square of each token multiplies its results by, into shared memory `factors` [tokens]: every block of threads
    sums `squares`, float32 [tokens] behind one another, in the same order. partial: a number for each thread; not in the interpreter."""
    tokens = factors.shape[0]

    def work(_: Any, squares: Any, partial: Any, factors: Any) -> None:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm
        from jaxlib.mlir.dialects import math as maths

        kind, mine = ir.F32Type.get(), thread()

        def at(ref: Any, place: Any) -> Any:
            return utils.getelementptr(utils.memref_ptr(ref), [place], kind)

        def c(value: int) -> Any:
            return utils.c(value, mine.type)

        size, total = ir.MemRefType(squares.type).shape[0], utils.c(0.0, kind)
        for begin in range(0, size, THREADS):
            place = arith.addi(mine, c(begin))
            there = arith.cmpi(arith.CmpIPredicate.ult, place, c(size))
            found = llvm.load(kind, at(squares, arith.select(there, place, c(0))))
            total = arith.addf(total, arith.select(there, found, utils.c(0.0, kind)))
        llvm.store(total, at(partial, mine))
        utils.warpgroup_barrier()
        token = arith.remui(mine, c(tokens))
        parts = [llvm.load(kind, at(partial, arith.addi(token, c(index * tokens)))) for index in range(THREADS // tokens)]
        mean = arith.mulf(reduce(arith.addf, parts), utils.c(1.0 / inputs, kind))
        root = maths.rsqrt(arith.addf(mean, utils.c(epsilon, kind)))
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, mine, c(tokens))):
            llvm.store(root, at(factors, mine))
        utils.warpgroup_barrier()

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)(work)(squares, partial, factors)
