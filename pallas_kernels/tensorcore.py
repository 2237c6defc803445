"""What kernels for TPUs (Pallas Mosaic TPU) share: generations, copies that are counted, the call itself, interpretation.

A kernel runs once per TensorCore, with its scalars in SMEM and its arrays in HBM; it copies what it needs into VMEM ahead of use, each
copy through `Copies`, so that a test can count the bytes. Knows no attention, no pages and no op.
"""

import re
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

from pallas_kernels.dispatch import Key, Target

LANES = 128
DTYPES = ("bfloat16", "float32")
WORD = 4  # bytes: what copies are counted in

_interpreted: ContextVar[bool] = ContextVar("pallas_kernels_tensorcore_interpreted", default=False)
_counted: ContextVar[list[int] | None] = ContextVar("pallas_kernels_tensorcore_counted", default=None)


class Generation(NamedTuple):
    """What differs between generations: VMEM bytes of a core, cores that one device has, side of the matrix unit."""

    name: str
    vmem: int
    cores: int
    side: int


GENERATIONS = (
    (re.compile(r"v5 ?lite|v5e", re.I), Generation("v5e", 128 << 20, 1, 128)),
    (re.compile(r"v5", re.I), Generation("v5p", 64 << 20, 2, 128)),
    (re.compile(r"v6", re.I), Generation("v6e", 128 << 20, 1, 256)),
    (re.compile(r"7x|v7", re.I), Generation("7x", 64 << 20, 1, 256)),
)


def generation(device: str) -> Generation | None:
    """Of a device kind such as "TPU v5 lite"; None for what these kernels do not know. The interpreter is a v5e."""
    if interpreting():
        return GENERATIONS[0][1]
    found = [which for pattern, which in GENERATIONS if pattern.search(device)]
    return found[0] if found and "tpu" in device.lower() else None


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
    vmem: int = 64 << 20


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
    outputs = pl.pallas_call(
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
    )(*scalars, *arrays, *constants)
    if counts is not None:
        jax.debug.callback(lambda words: counts.append(WORD * int(words[0])), outputs[-1])
        outputs = outputs[:-1]
    return list(outputs)
