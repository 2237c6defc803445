"""What kernels for TPUs (Pallas Mosaic TPU) share: generations, copies that are counted, the call itself, interpretation.

A kernel runs once per TensorCore, with its scalars in SMEM and its arrays in HBM; it copies what it needs into VMEM ahead of use, each
copy through `Copies`, so that a test can count the bytes. Knows no attention, no pages and no op.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import generations
from pallas_kernels.dispatch import Key, Target
from pallas_kernels.generations import Generation

LANES = 128
DTYPES = ("bfloat16", "float32")
WORD = 4  # bytes: what copies are counted in

_interpreted: ContextVar[bool] = ContextVar("pallas_kernels_tensorcore_interpreted", default=False)
_counted: ContextVar[list[int] | None] = ContextVar("pallas_kernels_tensorcore_counted", default=None)
_recorded: ContextVar[list["Recorded"] | None] = ContextVar("pallas_kernels_tensorcore_recorded", default=None)


def generation(device: str) -> Generation | None:
    """Of a device kind such as "TPU v5 lite"; None for what these kernels do not know. The interpreter is a v5e."""
    return generations.V5E if interpreting() else generations.find(device)


def tile_of(outputs: int, stored: int, room: int) -> int:
    """How many of a weight's outputs are copied at a time, each a row of `stored` bytes: all of few; else as many whole vectors of lanes as
    fit into `room` bytes, a divisor of the outputs if there is one (the last tile is shorter otherwise)."""
    if outputs <= LANES:
        return outputs
    most = max(min(room // stored, 1024) // LANES * LANES, LANES)
    return next((size for size in range(most, 0, -LANES) if outputs % size == 0), most)


def copy_tile(tile: Any, size: int, outputs: int, copy: Callable[[int], None]) -> None:
    """Call copy(rows) for tile number `tile` of a weight: the last tile may be shorter; what its other rows give is cut off in the end."""
    if not outputs % size:
        copy(size)
        return
    last = tile == outputs // size
    pl.when(last)(lambda: copy(outputs % size))
    pl.when(jnp.logical_not(last))(lambda: copy(size))


def refusal(target: Target, key: Key) -> str | None:
    """Why no kernel of this kind can run on a target, or for the dtype of a key that knows it; None when they can."""
    if generation(target.device) is None:
        return f"its kernels are for TPU v5e, v5p, v6e and 7x, this is {target.device}"
    if key.get("dtype") not in (None, *DTYPES):
        return f"its kernels compute in {' or '.join(DTYPES)}, not in {key['dtype']}"
    return None


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, kernels are traced to run in jax's interpreter of Mosaic TPU, races detected, memory NaN until written (slow: for tests)."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def interpreting() -> bool:
    """Whether kernels are being traced for the interpreter."""
    return _interpreted.get()


@contextmanager
def counted() -> Iterator[list[int]]:
    """Inside, kernels are traced to count the bytes they copy between HBM and VMEM; each call appends its bytes to the list."""
    found: list[int] = []
    token = _counted.set(found)
    try:
        yield found
    finally:
        jax.effects_barrier()
        _counted.reset(token)


@contextmanager
def recorded() -> Iterator[list["Recorded"]]:
    """Inside, kernels are not called but appended to the list, with what they were given; their outputs are of the right shape."""
    found: list[Recorded] = []
    token = _recorded.set(found)
    try:
        yield found
    finally:
        _recorded.reset(token)


def sublanes(dtype: Any) -> int:
    """Rows of a tile: a copy of part of an array begins and ends at multiples of it."""
    return 32 // jnp.dtype(dtype).itemsize


def ceil_to(number: int, multiple: int) -> int:
    """The smallest multiple that is not smaller."""
    return -(-number // multiple) * multiple


class Copies:
    """Starts and awaits a kernel's copies, and adds up their words where it was given a counter."""

    def __init__(self, counter: Any | None) -> None:
        self._counter = counter

    def start(self, source: Any, destination: Any, semaphore: Any) -> None:
        """Begin; source and destination have the same shape."""
        if self._counter is not None:
            size = int(np.prod(source.shape)) * jnp.dtype(source.dtype).itemsize
            self._counter[0] += size // WORD
        pltpu.make_async_copy(source, destination, semaphore).start()

    def wait(self, source: Any, destination: Any, semaphore: Any) -> None:
        """Until a copy of this shape is done."""
        pltpu.make_async_copy(source, destination, semaphore).wait()


class Call(NamedTuple):
    """A kernel: its body's refs are scalars (SMEM), arrays (HBM), constants (VMEM), outputs (HBM), scratch; `aliases` maps positions
    among the arrays to outputs that are the same memory."""

    name: str
    outputs: Sequence[jax.ShapeDtypeStruct]
    scratch: Sequence[Any]
    aliases: dict[int, int]
    cost: pl.CostEstimate
    cores: int = 1
    vmem: int = 48 << 20  # of the smallest core's 64 MiB


def buffer_bytes(call: Call) -> int:
    """VMEM that a call's scratch takes, in whole tiles."""
    found = 0
    for each in call.scratch:
        if getattr(each, "memory_space", None) == pltpu.VMEM:
            *most, rows, lanes = (1, *each.shape)
            found += math.prod(most) * ceil_to(rows, sublanes(each.dtype)) * ceil_to(lanes, LANES) * jnp.dtype(each.dtype).itemsize
    return found


class Recorded(NamedTuple):
    """A call that was asked for: `kernel` takes scalars, then arrays and constants; of these the shapes are kept."""

    call: Call
    kernel: Callable[..., Any]
    scalars: Sequence[Any]
    rest: Sequence[jax.ShapeDtypeStruct]


def run(call: Call, body: Callable[..., None], scalars: Sequence[Any], arrays: Sequence[Any], constants: Sequence[Any] = ()) -> list[Any]:
    """The outputs. body(copies, scalars, arrays, constants, outputs, scratch), once for each core."""
    counts = _counted.get()
    sizes = (len(scalars), len(arrays), len(constants), len(call.outputs), int(counts is not None), len(call.scratch))
    places = np.cumsum((0, *sizes))

    def entry(*refs: Any) -> None:
        own = [refs[a:b] for a, b in pairwise(places)]
        counter = own[4][0] if own[4] else None
        if counter is not None:
            counter[0] = 0
        body(Copies(counter), own[0], own[1], own[2], own[3], own[5])

    anywhere, words = pl.BlockSpec(memory_space=pl.ANY), jax.ShapeDtypeStruct((1,), jnp.int32)
    in_specs = [anywhere] * len(arrays) + [pl.BlockSpec(memory_space=pltpu.VMEM)] * len(constants)
    out_specs = [anywhere] * len(call.outputs) + [pl.BlockSpec(memory_space=pltpu.SMEM)] * sizes[4]
    kernel = pl.pallas_call(
        entry,
        out_shape=[*call.outputs, *[words] * sizes[4]],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars), grid=(call.cores,), in_specs=in_specs, out_specs=out_specs, scratch_shapes=call.scratch
        ),
        input_output_aliases={len(scalars) + given: made for given, made in call.aliases.items()},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel" if call.cores > 1 else "arbitrary",), vmem_limit_bytes=call.vmem
        ),
        cost_estimate=call.cost,
        interpret=pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan") if interpreting() else False,
        name=call.name,
    )
    records = _recorded.get()
    if records is not None:
        records.append(Recorded(call, kernel, scalars, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays, *constants)]))
        number = jnp.ravel(arrays[0])[0]  # known as little as the arrays are
        return [jnp.broadcast_to(number.astype(x.dtype), x.shape) for x in call.outputs]
    outputs = kernel(*scalars, *arrays, *constants)
    if counts is not None:
        jax.debug.callback(lambda words: counts.append(WORD * int(words[0])), outputs[-1])
        outputs = outputs[:-1]
    return list(outputs)
