"""What kernels for Hopper GPUs (compute capability 9.0, Pallas Mosaic GPU) share: scratch memory, the softmax step, interpretation.

A kernel's warpgroups (128 threads) have roles. Producers copy blocks of keys and values into swizzled shared memory ahead of use (TMA),
consumers keep a tile of 64 queries and its online softmax in registers and feed the tensor cores (wgmma), as FlashAttention-2 and -3 do
(arXiv 2307.08691, 2407.08608). Scores are kept in base 2: exp2 is what the hardware has. Knows nothing of pages, rows or devices.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import LOWEST, AttentionSpec
from pallas_kernels.dispatch import Key, Target

DEVICES = re.compile(r"\bG?H(100|200|800|20)\b")  # device kinds of compute capability 9.0
HEAD_DIMS = (64, 96, 128, 256)
TILE = 64  # queries of a warpgroup: what one wgmma multiplies
SHARED_BYTES = 227 << 10  # shared memory that one block of threads may have
REGISTERS = 65536  # of a multiprocessor
BARRIERS = 32  # of one group, at most
REDUCTION_BYTES = 256  # of it, set aside for reductions
LOG2E = math.log2(math.e)
NO_CLUSTER: Mapping[str, int] = {}
ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
ROWS, COLUMNS, WHOLE = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA

_interpreted: ContextVar[bool] = ContextVar("pallas_kernels_hopper_interpreted", default=False)


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, kernels are traced to run in jax's interpreter of Mosaic GPU, on any platform (slow: for tests).

    The interpreter runs each warpgroup in a thread of XLA's pool: show it 8 CPU devices (`jax_num_cpu_devices`), for which XLA makes as
    many threads, or it waits for ever on a machine with few cores.
    """
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def interpreting() -> bool:
    """Whether kernels are being traced for the interpreter."""
    return _interpreted.get()


def refusal(target: Target, key: Key) -> str | None:
    """Why no kernel of this kind can run on a target, or for the dtype and head_dim of a key that knows them; None when they can."""
    dtype, head_dim = key.get("dtype"), key.get("head_dim")
    if jax.__version_info__ < (0, 11):
        return f"its kernels need jax 0.11 or newer, this is {jax.__version__}"
    if not (interpreting() or DEVICES.search(target.device)):
        return f"its kernels are for Hopper GPUs (H100, H200, H800, H20, GH200), this is {target.device}"
    if dtype not in (None, "bfloat16", "float16"):
        return f"its kernels compute in bfloat16 or float16, not in {dtype}"
    if head_dim not in (None, *HEAD_DIMS):
        return f"its kernels know head_dim {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    return None


def cores() -> int:
    """Streaming multiprocessors of the device that is traced for, as many blocks of threads run at once; 2 for the interpreter."""
    return 2 if interpreting() else known_cores() or 132


def known_cores() -> int | None:
    """As many as the device that is traced for says it has; None if it does not say."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return getattr(jax.local_devices()[0], "core_count", None) if described is None else described.num_cores


def kernel(
    body: Callable[..., None],
    scratch: tuple[Any, ...],
    *,
    out_type: Any,
    grid: dict[str, int],
    cluster: Mapping[str, int] = NO_CLUSTER,
    registers: Sequence[int | None] = (None,),
) -> Callable[..., Any]:
    """`body(*refs, scratch)` over a grid of named dimensions, in warpgroups (axis "wg") that share the scratch memory. cluster: dimensions
    of blocks that run beside each other, for each of the grid; registers: for each warpgroup what its `set_max_registers` asks for, None
    if it does not ask.

    Call the result with the kernel's arrays.

    Raises:
        ValueError: they ask for more than a block has; on a card one of them would wait for ever.
    """
    wanted, there = sum(number or 0 for number in registers), len(registers) * registers_of(len(registers))
    if wanted > there:
        raise ValueError(f"{len(registers)} warpgroups ask for {wanted} registers a thread in all, and begin with {there}")

    def entry(*refs: Any) -> None:
        pl.run_scoped(lambda *made: body(*refs, made), *scratch, collective_axes="wg")

    return plgpu.kernel(
        named(entry, getattr(body, "__module__", __name__)),
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=tuple(cluster.values()),
        cluster_names=tuple(cluster),
        num_threads=len(registers),
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=REDUCTION_BYTES),
        interpret=interpretation(),
    )


def named(body: Callable[..., None], module: str) -> Callable[..., None]:
    """A kernel's body under the name that profiles call it by, that of the module which it is from."""

    def entry(*refs: Any) -> None:
        body(*refs)

    entry.__name__ = "_".join(module.split(".")[1:])
    return entry


def registers_of(warpgroups: int) -> int:
    """Registers that each thread of a block begins with, at most."""
    return min(REGISTERS // (128 * warpgroups) // 8 * 8, 255)


def start_runtime() -> None:
    """Run the smallest kernel: programs that were compiled elsewhere load only where Mosaic GPU's runtime is in the process already."""
    jax.block_until_ready(jax.jit(smallest())(np.zeros((TILE, 64), np.float32)))


def smallest() -> Callable[..., Any]:
    """A kernel that copies a float32 [64, 64]."""

    def copy(source: Any, target: Any, scratch: tuple[Any, Any]) -> None:
        shared, barrier = scratch
        plgpu.copy_gmem_to_smem(source, shared, barrier)
        plgpu.barrier_wait(barrier)
        plgpu.copy_smem_to_gmem(shared, target)
        plgpu.wait_smem_to_gmem(0)

    numbers = jax.ShapeDtypeStruct((TILE, 64), jnp.float32)
    return kernel(copy, (plgpu.SMEM(numbers.shape, numbers.dtype), plgpu.Barrier()), out_type=numbers, grid={"block": 1})


def interpretation() -> Any:
    """What `plgpu.kernel` wants to know of interpretation."""
    return plgpu.InterpretGPUParams() if interpreting() else None  # pyright: ignore[reportAttributeAccessIssue]


def swizzled(shape: tuple[int, ...], dtype: Any, *, like: int | None = None) -> Any:
    """Shared memory in the form that TMA writes and wgmma reads without bank conflicts; like: as rows of so many are."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle((like or shape[-1]) * bits)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)))


def spill(warpgroups: int, keys: int, dtype: Any) -> tuple[Any, ...]:
    """Scratch for `weigh`'s weights, which only the interpreter needs: it multiplies from shared memory."""
    return (swizzled((warpgroups, TILE, keys), dtype),) if interpreting() else ()


class State(NamedTuple):
    """The online softmax of a tile: values weighted so far, largest score (base 2), sum of weights."""

    weighted: Any  # [64, head_dim] float32
    top: Any  # [64]
    total: Any  # [64]


def start(head_dim: int) -> State:
    """The state before any key."""
    return State(
        plgpu.layout_cast(jnp.full((TILE, head_dim), 0, jnp.float32), WHOLE),
        plgpu.layout_cast(jnp.full((TILE,), LOWEST, jnp.float32), ROWS),
        plgpu.layout_cast(jnp.full((TILE,), 0, jnp.float32), ROWS),
    )


def products(queries: Any, keys: Any, meanwhile: Callable[[], None] = lambda: None) -> Any:
    """queries [64, head_dim] times keys [keys, head_dim], both in shared memory, float32; `meanwhile` runs while the tensor cores do."""

    def multiply(accumulator: Any) -> Any:
        plgpu.wgmma(accumulator, queries, keys.transpose((1, 0)))
        meanwhile()
        return accumulator[...]

    return pl.run_scoped(multiply, ACC((TILE, keys.shape[0]), jnp.float32))


def shape_scores(products: Any, spec: AttentionSpec) -> tuple[Any, float]:
    """Scores, and the factor that still has to multiply them to bring them to base 2: it is folded into what follows."""
    if spec.soft_cap is None:
        return products, spec.scale * LOG2E
    return jnp.tanh(products * (spec.scale / spec.soft_cap)) * (spec.soft_cap * LOG2E), 1.0


def index(shape: tuple[int, int], dimension: int, offset: Any) -> Any:
    """offset + position along a dimension, in the layout of a tile of scores."""
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=WHOLE) + offset


def weights(state: State, scores: Any, factor: float) -> tuple[Any, Any, State]:
    """One block of scores (-inf where not seen) enters the softmax: its weights, the decay of what there was, and the new state.

    The state's `weighted` is left to the caller: `spread(decay, ...)` has to multiply it before `weigh` adds to it.
    """
    top = jnp.maximum(state.top, scores.max(axis=1) * factor)
    decay = jnp.exp2(state.top - top)
    share = jnp.exp2(scores * factor - spread(top, scores.shape))
    return share, decay, State(state.weighted, top, state.total * decay + share.sum(axis=1))


def load(ref: Any, layout: Any, *, coalesced: bool = True) -> Any:
    """Memory into registers. coalesced False allows reads that are not, in layouts that repeat numbers."""
    return plgpu.load(ref, layout=layout, optimized=coalesced)  # pyright: ignore[reportCallIssue]


def store(ref: Any, values: Any) -> None:
    """Registers into memory, in layouts that repeat numbers or leave gaps; from jax 0.12 on that must be allowed."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, values, optimized=False)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        ref[...] = values


def spread(rows: Any, shape: tuple[int, ...]) -> Any:
    """One number per row, along the row."""
    return lax.broadcast_in_dim(rows, shape, [0])


def weigh(weighted: Any, share: Any, values: Any, spilled: Any) -> Any:
    """weighted [64, head_dim] + share [64, keys] times values [keys, head_dim]; spilled: `spill`'s memory of this warpgroup."""
    if spilled is None:
        return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, share, values))(ACC.init(weighted))
    spilled[...] = share
    plgpu.commit_smem()

    def multiply(accumulator: Any) -> Any:
        plgpu.wgmma(accumulator, spilled, values)
        return accumulator[...]

    return weighted + pl.run_scoped(multiply, ACC(weighted.shape, jnp.float32))


def clear(values: Any, first: Any, floor: Any, stop: Any) -> None:
    """Zero the values in shared memory whose key (`first` for the block's first) is outside [floor, stop): 0 * NaN is NaN.

    floor None: no lower end. Does nothing for a block that is whole.
    """
    keys, head_dim = values.shape
    partial = first + keys > stop
    if floor is not None:
        partial |= first < floor

    @pl.when(partial)
    def _clear() -> None:
        for begin in range(0, keys, TILE):
            part = values.at[pl.ds(begin, TILE)]
            key = index((TILE, head_dim), 0, first + begin)
            known = key < stop
            if floor is not None:
                known &= key >= floor
            found = load(part, WHOLE)
            part[...] = jnp.where(known, found, jnp.zeros_like(found))
        plgpu.commit_smem()


def drain(barrier: Callable[[Any], Any], used: Any, stages: int) -> None:
    """Wait for what consumers still have to say about the last blocks: a barrier must be at rest when the kernel ends."""

    def wait(block: Any, _: None) -> None:
        plgpu.barrier_wait(barrier(lax.rem(block, jnp.int32(stages))))

    lax.fori_loop(jnp.maximum(used - stages, 0), used, wait, None)
