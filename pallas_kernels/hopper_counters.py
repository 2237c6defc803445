"""Memory that the kernels of one Hopper program share: counters by which blocks of threads find out which of them is the last, or wait for
each other, and room for what they send each other (`hopper_mail`).

It is made of zeros where the program begins (`made`) and passed on as a reference: kernels that have it run one after another. Each leaves
the counters as it found them, but for the turn. What a block wrote before it counts can be read by whoever has seen the count. jax's
interpreter knows none of this.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, hopper

LEFT, TURN = 0, 1  # blocks of a kernel that have left it; 0 or 1, the other one for every other kernel that is left
FIRST = 16  # counter that is free for other uses
PLACES = 8192  # from there on
ROOM = FIRST + PLACES  # where the rest begins: two halves, one for each turn
HALF = 32768


def made() -> Any:
    """A program's memory, where its kernels are for Hopper and not interpreted; None elsewhere."""
    if hopper.interpreting() or hopper.refusal(dispatch.target(), {}) is not None:
        return None
    return jax.new_ref(jnp.zeros((ROOM + 2 * HALF,), jnp.int32))


def leave(counters: Any, of: int) -> None:
    """A block says that it looks at the turn no more; the last one of all `of` changes it. For one warpgroup of each block."""

    def change(_: Any, counters: Any) -> None:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm

        word = ir.IntegerType.get_signless(32)
        left, turn = (utils.getelementptr(utils.memref_ptr(counters), [place], word) for place in (LEFT, TURN))
        utils.warpgroup_barrier()
        with utils.single_thread(utils.ThreadSubset.WARPGROUP):
            before = _add_one(left)
            with utils.when(arith.cmpi(arith.CmpIPredicate.eq, before, utils.c(of - 1, word))):
                _clear(left)
                llvm.store(arith.subi(utils.c(1, word), llvm.load(word, turn)), turn)

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(change)(counters)


def last(counters: Any, number: Any, of: Any, told: Any) -> Any:
    """Count one at a place from `FIRST` on; whether that makes `of`, and if so the place is cleared. told: int32 [1] in shared memory of
    this warpgroup, by which all its threads learn of it."""
    place = counters.at[pl.ds(number, 1)]

    def count(_: Any, place: Any, told: Any) -> None:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir.dialects import llvm

        utils.warpgroup_barrier()
        with utils.single_thread(utils.ThreadSubset.WARPGROUP):
            llvm.store(_add_one(utils.memref_ptr(place)), utils.memref_ptr(told))
        utils.warpgroup_barrier()

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))(count)(place, told)
    done = told[0] == of - 1
    pl.when(done)(lambda: _leave_zeros(place, 1))
    return done


def tell(counters: Any, number: int) -> None:
    """Count one at the place `number` behind `FIRST`: what this block has written, by any of a warpgroup's threads, can be read, or copied
    (TMA), by whoever has waited for all counts. For one warpgroup of each block."""

    def count(_: Any, place: Any) -> None:
        from jax.experimental.mosaic.gpu import utils

        asm(None, [], "fence.proxy.async;", "")
        utils.warpgroup_barrier()
        with utils.single_thread(utils.ThreadSubset.WARPGROUP):
            asm(None, [utils.memref_ptr(place)], "red.release.gpu.global.add.u32 [$0], 1;", "l")

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(count)(counters.at[pl.ds(FIRST + number, 1)])


def wait(counters: Any, number: int, of: int) -> None:
    """Until `of` have counted there. All blocks must run at once. For whole warpgroups, as many of a block as like."""

    def look(_: Any, place: Any) -> None:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, scf

        word = ir.IntegerType.get_signless(32)
        loop = scf.WhileOp([], [])
        with ir.InsertionPoint(loop.before.blocks.append()):
            found = asm(word, [utils.memref_ptr(place)], "ld.acquire.gpu.global.u32 $0, [$1];", "=r,l")
            scf.condition(arith.cmpi(arith.CmpIPredicate.ult, found, utils.c(of, word)), [])
        with ir.InsertionPoint(loop.after.blocks.append()):
            scf.yield_([])
        asm(None, [], "fence.proxy.async;", "")
        utils.warpgroup_barrier()

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(look)(counters.at[pl.ds(FIRST + number, 1)])


def clear(counters: Any, numbers: int) -> None:
    """Leave the first `numbers` places behind `FIRST` as they were found. For one warpgroup of the last block that looks at them."""

    _leave_zeros(counters.at[pl.ds(FIRST, numbers)], numbers)


def _leave_zeros(places: Any, count: int) -> None:
    def work(_: Any, places: Any) -> None:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir

        with utils.single_thread(utils.ThreadSubset.WARPGROUP):
            for number in range(count):
                _clear(utils.getelementptr(utils.memref_ptr(places), [number], ir.IntegerType.get_signless(32)))

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(work)(places)


def _add_one(pointer: Any) -> Any:
    """What was there before. Whoever counts later can read what was written before this, and this one what others had written."""
    from jaxlib.mlir import ir

    return asm(ir.IntegerType.get_signless(32), [pointer], "atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;", "=r,l")


def _clear(pointer: Any) -> None:
    """By one thread, when nobody else looks."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    llvm.store(utils.c(0, ir.IntegerType.get_signless(32)), pointer)


def asm(result: Any, operands: list[Any], code: str, constraints: str) -> Any:
    """An instruction of PTX that must stay where it is; result: its type, None for none."""
    from jaxlib.mlir.dialects import llvm

    return llvm.inline_asm(result, operands, code, constraints, has_side_effects=True)
