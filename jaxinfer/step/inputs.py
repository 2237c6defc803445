"""A batch becomes one fresh int32 buffer for the device: the only padding in the project.

`pack` lays the rows of a batch out in a bucket's shape, replica after replica; `unpack` cuts the buffer into named arrays inside the
compiled program. One buffer means one transfer a step, and a fresh one for each step means that nothing can change under a
running program. Unused rows are empty, unused tokens have position -1, unused page entries name the guard page.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from jaxtyping import Array, Int

from jaxinfer.batch import Batch, Row
from jaxinfer.cache.pages import GUARD_PAGE
from jaxinfer.sampling import pytree
from jaxinfer.step.buckets import Bucket

PADDING_POSITION = -1
ALIGNMENT = 64  # words: kernels take arrays that begin at multiples of 256 bytes, and a part of a buffer is passed on as it lies


@dataclass(frozen=True)
class Shapes:
    """Sizes that a buffer's layout follows from: the bucket, replicas, page-table width, and the slot that padding rows use."""

    bucket: Bucket
    replicas: int
    pages_per_row: int
    page_size: int
    spare_slot: int

    def fields(self) -> dict[str, tuple[int, ...]]:
        """Name and shape, per replica, of everything in the buffer, in order."""
        rows, tokens = (self.bucket.rows,), (self.bucket.tokens,)
        return {
            "tokens": tokens, "positions": tokens, "page_tables": (*rows, self.pages_per_row), "query_starts": rows,
            "query_lengths": rows, "kv_lengths": rows, "slots": rows, "samples": rows,
        }  # fmt: skip

    def offsets(self) -> dict[str, tuple[int, int]]:
        """Where each field begins and ends in one replica's part; each begins where an array of its own could."""
        ends, at = {}, 0
        for name, shape in self.fields().items():
            ends[name] = (at, at + prod(shape))
            at += prod(shape) + -prod(shape) % ALIGNMENT
        return ends

    @property
    def buffer(self) -> tuple[int, int]:
        """Shape of the whole buffer: [replicas, words]."""
        return self.replicas, max(end for _, end in self.offsets().values())


@pytree
@dataclass(frozen=True)
class StepInputs:
    """The arrays of one step, replicas one after another. `samples` is 1 where the row draws a token."""

    tokens: Int[Array, " tokens"]
    positions: Int[Array, " tokens"]
    page_tables: Int[Array, "rows pages_per_row"]
    query_starts: Int[Array, " rows"]
    query_lengths: Int[Array, " rows"]
    kv_lengths: Int[Array, " rows"]
    slots: Int[Array, " rows"]
    samples: Int[Array, " rows"]


@dataclass(frozen=True)
class Packed:
    """A batch ready for the device: the buffer, and for each row of the batch its index among the program's rows."""

    shapes: Shapes
    buffer: np.ndarray
    rows: tuple[tuple[int, Row], ...]


def pack(batch: Batch, shapes: Shapes) -> Packed:
    """Lay a batch out in a bucket; in one without decode rows, decodes are the first prefill rows.

    Raises:
        ValueError: a row names the guard page or too few pages; the scheduler and the pool disagree.
    """
    batch = batch if shapes.bucket.decode_rows else batch.folded()
    buffer = np.zeros(shapes.buffer, np.int32)
    parts = [_views(buffer[r], shapes) for r in range(shapes.replicas)]
    for part in parts:
        part["positions"].fill(PADDING_POSITION)
        part["page_tables"].fill(GUARD_PAGE)
        part["slots"].fill(shapes.spare_slot)
    placed: list[tuple[int, Row]] = []
    decodes, prefills, tokens = [0] * shapes.replicas, [0] * shapes.replicas, [0] * shapes.replicas
    for row in batch.decodes:
        index = decodes[row.replica]
        decodes[row.replica] += 1
        _place(parts[row.replica], row, index, index * shapes.bucket.decode_tokens, page_size=shapes.page_size)
        placed.append((row.replica * shapes.bucket.rows + index, row))
    for row in batch.prefills:
        index = shapes.bucket.decode_rows + prefills[row.replica]
        prefills[row.replica] += 1
        _place(parts[row.replica], row, index, shapes.bucket.decode_size + tokens[row.replica], page_size=shapes.page_size)
        tokens[row.replica] += len(row.tokens)
        placed.append((row.replica * shapes.bucket.rows + index, row))
    return Packed(shapes, buffer, tuple(placed))


def unpack(buffer: Int[Array, "replicas words"], shapes: Shapes) -> StepInputs:
    """Cut a buffer into the step's arrays (inside the program)."""
    offsets = shapes.offsets()
    return StepInputs(**{
        name: buffer[:, slice(*offsets[name])].reshape(shapes.replicas * shape[0], *shape[1:]) for name, shape in shapes.fields().items()
    })  # fmt: skip


def _views(part: np.ndarray, shapes: Shapes) -> dict[str, np.ndarray]:
    offsets = shapes.offsets()
    return {name: part[slice(*offsets[name])].reshape(shape) for name, shape in shapes.fields().items()}


def _place(part: dict[str, np.ndarray], row: Row, index: int, first_token: int, *, page_size: int) -> None:
    count = len(row.tokens)
    if len(row.pages) * page_size < row.kv_length or GUARD_PAGE in row.pages:
        raise ValueError(f"row {index} has {row.kv_length} tokens in pages {row.pages}: too few, or the guard page")
    part["tokens"][first_token : first_token + count] = row.tokens
    part["positions"][first_token : first_token + count] = range(row.start, row.start + count)
    part["page_tables"][index, : len(row.pages)] = row.pages
    part["query_starts"][index] = first_token
    part["query_lengths"][index] = count
    part["kv_lengths"][index] = row.kv_length
    part["slots"][index] = row.slot
    part["samples"][index] = row.samples
