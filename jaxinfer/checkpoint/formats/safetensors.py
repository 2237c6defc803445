"""Tensors in safetensors files, opened by their headers and read slice by slice with pread.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, byte range), then the bytes. Everything the header says is
checked against the file before a tensor can be asked for: a file that passes has every tensor whole, each byte in exactly one tensor.
Files are not mapped into memory: a mapped file that shrinks kills the process, a short read is an error with a name.
Knows nothing of models, of which tensors should be there, or of devices.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from jaxinfer.checkpoint.errors import broken
from jaxinfer.checkpoint.json_files import unique_names

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
LENGTH_BYTES = 8
MAX_HEADER = 100_000_000  # the format's own limit
SHORTEST_RUN = 4096  # bytes: a slice in shorter pieces than a disk page is cut out of whole rows instead
BLOCK = 1 << 24  # bytes of whole rows read at once for that


class Entry(NamedTuple):
    """What a header says of one tensor; start counts from the beginning of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int


class SafetensorsFile:
    """One open file. Its tensors stay readable until `close`."""

    def __init__(self, path: Path) -> None:
        """Open the file and check its header.

        Raises:
            CheckpointError: the file cannot be read, or the header does not describe exactly the bytes that are there.
        """
        self.path, self.descriptor = path, -1
        if path.exists() and not path.is_file():
            raise broken(path, "a safetensors file", "something that is not a file")
        try:
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self.entries = _entries(path, self.descriptor)
        except OSError as error:
            self.close()
            raise broken(path, "a readable safetensors file", error.strerror or "an error") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor of the file, by name."""
        return {name: LazyTensor(self, name, entry.dtype, entry.shape, entry.start) for name, entry in self.entries.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still in its file."""

    file: SafetensorsFile
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def read(self, index: tuple[slice, ...]) -> Shaped[np.ndarray, "..."]:
        """The values of one slice per dimension (start and stop given, step 1), as a fresh array; other bytes are not read, unless
        the slice lies in pieces so short that reading whole rows is faster.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
        """
        sizes = tuple(part.stop - part.start for part in index)
        partial = [axis for axis, size in enumerate(sizes) if size != self.shape[axis]]
        last = partial[-1] if partial else 0
        run = math.prod(sizes[last:]) * self.dtype.itemsize
        if 0 < run < SHORTEST_RUN and math.prod(sizes[:last]) > 1:
            return self._read_rows(index, sizes)
        return self._read_runs(index, sizes, last)

    def _read_runs(self, index: tuple[slice, ...], sizes: tuple[int, ...], last: int) -> np.ndarray:
        """Each contiguous piece by itself: dimensions after `last` are whole."""
        out = np.empty(sizes, self.dtype)
        pieces = out.reshape(math.prod(sizes[:last]), -1).view(np.uint8) if out.size else []
        strides = [math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize for axis in range(len(self.shape))]
        outer = itertools.product(*(range(part.start, part.stop) for part in index[:last]))
        inner = index[last].start * strides[last] if index else 0
        for piece, position in zip(pieces, outer, strict=False):
            self._fill(piece, inner + sum(at * stride for at, stride in zip(position, strides, strict=False)))
        return out

    def _read_rows(self, index: tuple[slice, ...], sizes: tuple[int, ...]) -> np.ndarray:
        """Whole rows of the first dimension, a block at a time, and the slice cut out of them."""
        out, width = np.empty(sizes, self.dtype), math.prod(self.shape[1:])
        step = max(BLOCK // max(width * self.dtype.itemsize, 1), 1)
        for low in range(index[0].start, index[0].stop, step):
            high = min(low + step, index[0].stop)
            rows = np.empty((high - low, *self.shape[1:]), self.dtype)
            self._fill(rows.reshape(-1).view(np.uint8), low * width * self.dtype.itemsize)
            out[low - index[0].start : high - index[0].start] = rows[(slice(None), *index[1:])]
        return out

    def _fill(self, buffer: np.ndarray, offset: int) -> None:
        view, done = memoryview(buffer.data), 0
        while done < len(view):
            count = os.preadv(self.file.descriptor, [view[done : done + (1 << 30)]], self.start + offset + done)
            if count <= 0:
                raise broken(
                    self.file.path, f"{len(view)} bytes at {self.start + offset}", f"{done}: the file was truncated", tensor=self.name
                )
            done += count


def _entries(path: Path, descriptor: int) -> dict[str, Entry]:
    size = os.fstat(descriptor).st_size
    if size < LENGTH_BYTES:
        raise broken(path, f"a safetensors file (at least {LENGTH_BYTES} bytes)", f"{size} bytes", remedy="fetch it again")
    length = int.from_bytes(os.pread(descriptor, LENGTH_BYTES, 0), "little")
    if not 2 <= length <= min(size - LENGTH_BYTES, MAX_HEADER):
        expected = f"a header of 2 to {min(size - LENGTH_BYTES, MAX_HEADER)} bytes"
        raise broken(path, expected, f"{length}: truncated, or not a safetensors file", remedy="fetch it again")
    header = _parse(path, os.pread(descriptor, length, LENGTH_BYTES))
    first = LENGTH_BYTES + length
    entries = {name: _entry(path, name, value, first) for name, value in header.items()}
    _check_coverage(path, entries, first, size)
    return entries


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise broken(path, "a JSON header", f"{type(error).__name__}: {error}", remedy="fetch it again") from None
    if not isinstance(header, dict):
        raise broken(path, "a JSON object as header", type(header).__name__)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise broken(path, "__metadata__ to be an object of strings", metadata)
    return header


def _entry(path: Path, name: str, value: object, first: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise broken(path, "an entry of dtype, shape and data_offsets", value, tensor=name)
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise broken(path, f"a dtype of {', '.join(DTYPES)}", value["dtype"], tensor=name)
    shape, offsets = _naturals(value["shape"]), _naturals(value["data_offsets"])
    if shape is None:
        raise broken(path, "a shape of whole numbers", value["shape"], tensor=name)
    if offsets is None or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise broken(path, "data_offsets [begin, end]", value["data_offsets"], tensor=name)
    needed, found = math.prod(shape) * dtype.itemsize, offsets[1] - offsets[0]
    if needed != found:
        raise broken(path, f"{needed} bytes for {value['dtype']} {list(shape)}", f"{found} between its data_offsets", tensor=name)
    return Entry(dtype, shape, first + offsets[0])


def _naturals(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value):
        return None
    return tuple(value)


def _check_coverage(path: Path, entries: Mapping[str, Entry], first: int, size: int) -> None:
    """Each byte after the header belongs to exactly one tensor: no overlap, no hole, nothing missing, nothing left over."""
    position = first
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, math.prod(item[1].shape))):
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise broken(path, f"its data to begin at byte {position}", f"{entry.start}: it {kind}", tensor=name)
        position += math.prod(entry.shape) * entry.dtype.itemsize
        if position > size:
            raise broken(
                path, f"its data up to byte {position}", f"a file of {size} bytes: truncated", tensor=name, remedy="fetch it again"
            )
    if position != size:
        raise broken(path, f"{position} bytes as the header says", f"{size}", remedy="fetch it again")
