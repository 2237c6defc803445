"""Counters in memory by which a Hopper kernel's blocks of threads wait for each other, or find out which of them is the last.

The kernels of a program share one array of them, made with zeros where it begins (`made`) and passed on as a reference: kernels that have
it run one after another, so no two of them ever wait at a time. Each leaves zeros behind. What a block wrote before it counts can be read
by whoever has seen the count. A kernel whose blocks `meet` may have no more of them than run at once. jax's interpreter knows none of this.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, hopper

MEETINGS = 15  # of a kernel's blocks, at most; one more counts those that have left
FIRST = MEETINGS + 1  # counter that is free for other uses
PLACES = 8192  # from there on


def made() -> Any:
    """A program's counters, where its kernels are for Hopper and not interpreted; None elsewhere."""
    if hopper.interpreting() or hopper.refusal(dispatch.target(), {}) is not None:
        return None
    return jax.new_ref(jnp.zeros((FIRST + PLACES,), jnp.int32))


def meet(counters: Any, number: int, of: int) -> None:
    """Wait until all `of` blocks have come to this meeting of theirs, their `number`th. For one warpgroup of each block."""

    def wait(_: Any, counters: Any) -> None:
        from jax.experimental.mosaic.gpu import utils

        meter = utils.SemaphoreRef(_pointer(counters, number))
        utils.warpgroup_barrier()
        meter.signal(1, memory_scope="gpu")
        meter.wait(of, decrement=False, memory_scope="gpu")

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(wait)(counters)


def leave(counters: Any, meetings: int, of: int) -> None:
    """A block that will not wait any more says so; the last one clears the counters of the kernel's meetings."""

    def clear(_: Any, counters: Any) -> None:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir.dialects import arith

        with utils.single_thread(utils.ThreadSubset.WARPGROUP):
            before = _add_one(_pointer(counters, MEETINGS))
            with utils.when(arith.cmpi(arith.CmpIPredicate.eq, before, utils.c(of - 1, before.type))):
                for number in (*range(meetings), MEETINGS):
                    _clear(_pointer(counters, number))

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(clear)(counters)


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

    def clear(_: Any, place: Any) -> None:
        from jax.experimental.mosaic.gpu import utils

        with utils.single_thread(utils.ThreadSubset.WARPGROUP):
            _clear(utils.memref_ptr(place))

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))(count)(place, told)
    done = told[0] == of - 1
    pl.when(done)(lambda: plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(clear)(place))
    return done


def _pointer(counters: Any, number: int) -> Any:
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    return utils.getelementptr(utils.memref_ptr(counters), [number], ir.IntegerType.get_signless(32))


def _add_one(pointer: Any) -> Any:
    """What was there before. Whoever counts later can read what was written before this, and this one what others had written."""
    return _asm("atom.acq_rel.gpu.global.add.u32 $0, [$1], 1;", "=r,l", pointer)


def _clear(pointer: Any) -> None:
    """By one thread, when nobody else looks."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    llvm.store(utils.c(0, ir.IntegerType.get_signless(32)), pointer)


def _asm(code: str, constraints: str, pointer: Any) -> Any:
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    return llvm.inline_asm(ir.IntegerType.get_signless(32), [pointer], code, constraints, has_side_effects=True)
