"""A batch becomes one fresh int32 buffer for the device: the only padding in the project.

`pack` lays the rows of a batch out in a bucket's shape, replica after replica; `unpack` cuts the buffer into named arrays inside the
compiled program. One buffer means one transfer a step, and a fresh one for each step means that nothing can change under a
running program. Unused rows are empty, unused tokens have position -1, unused page entries name the guard page.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
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
    """Sizes that a buffer's layout follows from: the bucket, replicas, page-table width, the slot that padding rows use, and whether rows
    may begin where the step before has still to tell (`Row.unsettled`)."""

    bucket: Bucket
    replicas: int
    pages_per_row: int
    page_size: int
    spare_slot: int
    unsettled: bool = False

    def fields(self) -> dict[str, tuple[int, ...]]:
        """Name and shape, per replica, of everything in the buffer, in order."""
        rows, tokens = (self.bucket.rows,), (self.bucket.tokens,)
        return {
            "tokens": tokens, "positions": tokens, "page_tables": (*rows, self.pages_per_row), "query_starts": rows,
            "query_lengths": rows, "kv_lengths": rows, "slots": rows, "samples": rows, **({"unsettled": rows} if self.unsettled else {}),
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
    """The arrays of one step, replicas one after another. `samples` is 1 where the row draws a token, `unsettled` where it begins as many
    tokens earlier as drafts of the row's slot did not stand in the step before."""

    tokens: Int[Array, " tokens"]
    positions: Int[Array, " tokens"]
    page_tables: Int[Array, "rows pages_per_row"]
    query_starts: Int[Array, " rows"]
    query_lengths: Int[Array, " rows"]
    kv_lengths: Int[Array, " rows"]
    slots: Int[Array, " rows"]
    samples: Int[Array, " rows"]
    unsettled: Int[Array, " rows"] | None = None


@dataclass(frozen=True)
class Packed:
    """A batch ready for the device: the buffer, and for each row of the batch its index among the program's rows."""

    shapes: Shapes
    buffer: np.ndarray
    rows: tuple[tuple[int, Row], ...]


def pack(batch: Batch, shapes: Shapes) -> Packed:
    """Lay a batch out in a bucket; in one without decode rows, decodes are the first prefill rows.

    Raises:
        ValueError: a row names the guard page, too few pages or too many, or is unsettled where no program settles it; scheduler, pool and
            programs disagree.
    """
    batch = batch if shapes.bucket.decode_rows else batch.folded()
    layout = _layout(shapes)
    buffer, rows = layout.empty.copy(), batch.rows
    places = list(_places(batch, shapes))
    if rows:
        _write(buffer.reshape(-1), layout, rows, np.array(places, np.int64).T)
    indices = (replica * shapes.bucket.rows + index for replica, index, _ in places)
    return Packed(shapes, buffer, tuple(zip(indices, rows, strict=True)))


def unpack(buffer: Int[Array, "replicas words"], shapes: Shapes) -> StepInputs:
    """Cut a buffer into the step's arrays (inside the program)."""
    offsets = shapes.offsets()
    return StepInputs(**{
        name: buffer[:, slice(*offsets[name])].reshape(shapes.replicas * shape[0], *shape[1:]) for name, shape in shapes.fields().items()
    })  # fmt: skip


def _places(batch: Batch, shapes: Shapes) -> Iterator[tuple[int, int, int]]:
    """For each row of the batch its replica, which of the replica's rows it is, and where its tokens begin there."""
    bucket = shapes.bucket
    decodes, prefills, tokens = [0] * shapes.replicas, [bucket.decode_rows] * shapes.replicas, [bucket.decode_size] * shapes.replicas
    for row in batch.decodes:
        replica = row.replica
        yield replica, decodes[replica], decodes[replica] * bucket.decode_tokens
        decodes[replica] += 1
    for row in batch.prefills:
        replica = row.replica
        yield replica, prefills[replica], tokens[replica]
        prefills[replica] += 1
        tokens[replica] += len(row.tokens)


@dataclass(frozen=True)
class _Layout:
    """What a buffer of some shapes holds where no row is, and where in a replica's part its fields begin."""

    shapes: Shapes
    empty: Int[np.ndarray, "replicas words"]
    begins: dict[str, int]


@cache
def _layout(shapes: Shapes) -> _Layout:
    """Made once for each bucket."""
    empty, offsets = np.zeros(shapes.buffer, np.int32), shapes.offsets()
    for name, value in (("positions", PADDING_POSITION), ("page_tables", GUARD_PAGE), ("slots", shapes.spare_slot)):
        empty[:, slice(*offsets[name])] = value
    return _Layout(shapes, empty, {name: begin for name, (begin, _) in offsets.items()})


def _write(flat: Int[np.ndarray, " words"], layout: _Layout, rows: tuple[Row, ...], places: Int[np.ndarray, "3 rows"]) -> None:
    """Fill in the rows, each at its place (replica, index, first token): what is one number a row for all rows at once, only longer ones'
    tokens row by row."""
    replicas, indices, firsts = places
    parts, begins = replicas * layout.empty.shape[1], layout.begins
    counts, starts = np.array([len(row.tokens) for row in rows]), np.array([row.start for row in rows])
    ends = starts + counts
    of_rows = {
        "query_starts": firsts, "query_lengths": counts, "kv_lengths": ends, "slots": [row.slot for row in rows],
        "samples": [row.samples for row in rows], "unsettled": [row.unsettled for row in rows],
    }  # fmt: skip
    at = parts + indices
    for name, values in of_rows.items():
        if name in begins:
            flat[at + begins[name]] = values
        elif any(values):
            raise ValueError("a row waits for what came of its drafts, but this program cannot tell")
    at = parts + firsts
    flat[at + begins["tokens"]] = [row.tokens[0] for row in rows]
    flat[at + begins["positions"]] = starts
    for number in np.flatnonzero(counts > 1):
        row, first, count = rows[number], at[number], counts[number]
        flat[first + begins["tokens"] : first + begins["tokens"] + count] = row.tokens
        flat[first + begins["positions"] : first + begins["positions"] + count] = np.arange(row.start, row.start + count)
    _write_pages(flat, layout, rows, ends, parts, indices)


def _write_pages(
    flat: Int[np.ndarray, " words"], layout: _Layout, rows: tuple[Row, ...], ends: Int[np.ndarray, " rows"],
    parts: Int[np.ndarray, " rows"], indices: Int[np.ndarray, " rows"],
) -> None:  # fmt: skip
    """Fill in the rows' page tables, all at once; ends: how far they have to reach."""
    pages, held = array("i"), np.array([len(row.pages) for row in rows])
    for row in rows:
        pages.extend(row.pages)
    ids = np.asarray(pages)
    shapes, amiss = layout.shapes, (held * layout.shapes.page_size < ends) | (held > layout.shapes.pages_per_row)
    if amiss.any() or (ids == GUARD_PAGE).any():
        owners = np.repeat(np.arange(len(rows)), held)
        wrong = (*np.flatnonzero(amiss), *owners[ids == GUARD_PAGE])[0]
        found = list(rows[wrong].pages)
        raise ValueError(f"row {indices[wrong]} has {ends[wrong]} tokens in pages {found}: too few, too many, or the guard page")
    tables = parts + layout.begins["page_tables"] + indices * shapes.pages_per_row
    flat[np.repeat(tables - (np.cumsum(held) - held), held) + np.arange(len(ids))] = ids
