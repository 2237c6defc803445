"""What the decode kernel for Hopper is made of: its static shape, its arrays, its shared memory, and how blocks reach the consumer."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.hopper import ROWS
from pallas_kernels.hopper_columns import Room
from pallas_kernels.paged_attention.gpu_pages import Pages

KEYS = 64  # of a block
TILES = 2  # blocks whose values are there as numbers
ALIGNMENT = 1024  # bytes at whose multiples an array in shared memory may begin
ITEM = ("row", "chunk", "first block", "blocks", "stop", "sees")  # integers of an item; stop, sees: keys of the row's last, first token


class Plan(NamedTuple):
    """Static shape of a decode. A row has at most max_chunks chunks and `tiles` tiles of lines for each kv head; a tile has the queries of
    `tokens` tokens, each a group of them, padded to `padded` lines. codes: dtype of a quantised pool. merge (`gpu_combine.Merge`): whoever
    ends a row's last chunk merges them all; None: another kernel does."""

    spec: AttentionSpec
    pages: Pages
    max_chunks: int
    padded: int
    stages: int
    streams: int
    blocks: int  # of threads
    group: int
    tokens: int = 1
    tiles: int = 1
    codes: Any = None
    merge: Any = None

    @property
    def heads(self) -> int:
        """Heads that an item is taken for."""
        return self.pages.kv_heads * self.tiles

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread of a stream's consumer and of its producer."""
        if self.codes is None:
            return (208, 40) if self.streams == 2 else (232, 40)
        return (160, 96)

    @property
    def together(self) -> bool:
        """Whether keys and values of a block lie together, so that one copy brings both."""
        return self.pages.page_size == KEYS


class Refs(NamedTuple):
    """The kernel's arrays; scales belong to codes, counts, counters and merged to the merging."""

    q: Any
    kv: Any
    tables: Any
    items: Any
    count: Any
    scales: Any
    out: Any
    sums: Any
    counts: Any = None
    counters: Any = None
    merged: Any = None


class Tiles(NamedTuple):
    """The values of `TILES` blocks as bfloat16, made from codes, for each stream; keys: memory for a block of these that the interpreter
    needs."""

    values: Any
    full: Any
    free: Any
    keys: Any


class Scratch(NamedTuple):
    """Shared memory and barriers, each once per stream; room: the consumer's; scales and tiles belong to codes, told to the merging."""

    q: Any
    kv: Any
    sums: Any
    q_full: Any
    q_free: Any
    full: Any
    free: Any
    room: Any
    scales: Any = None
    tiles: Any = None
    told: Any = None


class Item(NamedTuple):
    """A chunk of a row for one head; slot is where its result goes."""

    slot: Any
    head: Any
    row: Any
    first: Any
    blocks: Any
    stop: Any
    sees: Any


def streams(head_dim: int) -> int:
    """Pairs of warpgroups in a block of threads: two where registers and shared memory suffice."""
    return 2 if head_dim <= 128 else 1


def shared_bytes(head_dim: int, stages: int, *, padded: int = 8, codes: bool = False) -> int:
    """Shared memory of a block of threads: queries, their weights and blocks in 16 bits, or blocks of codes with their scales and values of
    some in 16 bits. padded: lines of a tile of queries."""
    tiles, itemsize = (TILES, 1) if codes else (0, 2)
    blocks = KEYS * (tiles * 2 * head_dim + 2 * stages * (itemsize * head_dim + (4 if codes else 0)))
    lines = padded * (2 * head_dim + 4) + Room.nbytes(padded, KEYS)
    aligned = ALIGNMENT * (4 + tiles)
    return streams(head_dim) * (lines + blocks + 16 * (stages + 1 + tiles)) + aligned + hopper.REDUCTION_BYTES


def stages_that_fit(wanted: int, head_dim: int, padded: int, *, codes: bool) -> int:
    """As many blocks as are wanted in shared memory at once, fewer where many lines leave less room."""
    return next(n for n in range(wanted, 0, -1) if n == 1 or shared_bytes(head_dim, n, padded=padded, codes=codes) <= hopper.SHARED_BYTES)


def scratch_of(plan: Plan, head_dim: int, dtype: Any) -> Scratch:
    """The shared memory and barriers that a kernel asks for."""
    arrivals = (1 if plan.together else 2 * plan.pages.pieces(KEYS)) * (1 if plan.codes is None else 2)

    def barriers(*more: int, arrivals: int = 1) -> Any:
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=(plan.streams, *more) if more else plan.streams)

    found = Scratch(
        q=hopper.swizzled((plan.streams, plan.padded, head_dim), dtype),
        kv=hopper.swizzled((plan.streams, plan.stages, 2 * KEYS, head_dim), plan.codes or dtype),
        sums=plgpu.SMEM((plan.streams, plan.padded), jnp.float32),
        q_full=barriers(),
        q_free=barriers(),
        full=barriers(plan.stages, arrivals=arrivals),
        free=barriers(plan.stages),
        room=Room.scratch(plan.streams, (plan.padded, KEYS), dtype, head_dim=head_dim),
        told=None if plan.merge is None else plgpu.SMEM((plan.streams,), jnp.int32),
    )
    if plan.codes is None:
        return found
    spilled = hopper.swizzled((plan.streams, KEYS, head_dim), dtype) if hopper.interpreting() else None
    values = hopper.swizzled((plan.streams, TILES, KEYS, head_dim), dtype)
    tiles = Tiles(values, barriers(TILES), barriers(TILES), spilled)
    return found._replace(scales=plgpu.SMEM((plan.streams, plan.stages, 2 * KEYS), jnp.float32), tiles=tiles)


class Feed(NamedTuple):
    """Blocks as the consumer of a stream sees them; `used` is how many it has had before. Of a block of codes it reads the keys itself, the
    values as they were converted."""

    plan: Plan
    scratch: Scratch
    stream: Any
    used: Any

    def keys(self, number: Any) -> Any:
        """A block's keys, or their codes, once they are there."""
        slot = self._slot(number)
        plgpu.barrier_wait(self.scratch.full.at[self.stream, slot])
        return self.scratch.kv.at[self.stream].at[slot].at[pl.ds(0, KEYS)]

    def scales(self, number: Any) -> tuple[Any, Any]:
        """Those of the block's keys and of its values; for codes."""
        both = self.scratch.scales.at[self.stream].at[self._slot(number)]
        keys, values = (hopper.load(both.at[pl.ds(which * KEYS, KEYS)], ROWS, coalesced=False) for which in range(2))
        return keys, values

    def keys_used(self, number: Any) -> None:
        """Codes of keys, and scales, go back before the values do; plain keys with these."""
        if self.plan.codes is not None:
            plgpu.barrier_arrive(self.scratch.free.at[self.stream, self._slot(number)])

    def wait_for_values(self, number: Any) -> None:
        """Until the values are there; plain ones come with the keys."""
        if self.plan.codes is not None:
            plgpu.barrier_wait(self.scratch.tiles.full.at[self.stream, self._tile(number)])

    def values(self, number: Any) -> Any:
        """A block's values, as the tensor cores take them."""
        if self.plan.codes is not None:
            return self.scratch.tiles.values.at[self.stream].at[self._tile(number)]
        return self.scratch.kv.at[self.stream].at[self._slot(number)].at[pl.ds(KEYS, KEYS)]

    def values_used(self, number: Any) -> None:
        """Their memory goes back."""
        if self.plan.codes is not None:
            plgpu.barrier_arrive(self.scratch.tiles.free.at[self.stream, self._tile(number)])
        else:
            plgpu.barrier_arrive(self.scratch.free.at[self.stream, self._slot(number)])

    def _slot(self, number: Any) -> Any:
        return lax.rem(self.used + number, jnp.int32(self.plan.stages))

    def _tile(self, number: Any) -> Any:
        return lax.rem(self.used + number, jnp.int32(TILES))
