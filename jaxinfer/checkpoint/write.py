"""Tensors become safetensors files piece by piece: headers are planned first, so no tensor need be in memory whole.

A `Planned` tensor says what it will be and makes its bytes when its turn comes. Files are filled up to a limit; several are named by an
index, as Hugging Face does it. Hashes of tensors are taken as they pass.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.checkpoint.formats.folder import INDEX, SINGLE
from jaxinfer.checkpoint.formats.safetensors import DTYPES

FILE_BYTES = 1 << 30
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # of the header, so that data begin at a multiple of it

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: pieces() yields arrays whose bytes, one after another, are the tensor's."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_files(
    folder: Path, tensors: Sequence[Planned], *, limit: int = FILE_BYTES, progress: Progress | None = None
) -> dict[str, dict[str, str]]:
    """Write tensors in their order into as many files as it takes, and the index; the SHA-256 of each tensor, by file.

    progress is called with (bytes written, bytes in all).

    Raises:
        ValueError: the pieces of a tensor are not what was planned.
    """
    groups = _groups(tensors, limit)
    total, done = sum(tensor.nbytes for tensor in tensors), [0]

    def note(count: int) -> None:
        done[0] += count
        if progress is not None:
            progress(done[0], total)

    hashes, places = {}, {}
    for number, group in enumerate(groups, 1):
        name = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        hashes[name] = _write_file(folder / name, group, note)
        places |= dict.fromkeys(hashes[name], name)
    if len(groups) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1))
    return hashes


def _groups(tensors: Sequence[Planned], limit: int) -> list[list[Planned]]:
    groups: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups


def _write_file(path: Path, tensors: Iterable[Planned], note: Callable[[int], None]) -> dict[str, str]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, group = 0, list(tensors)
    for tensor in group:
        offsets = [at, at + tensor.nbytes]
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        at += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % ALIGNMENT)
    hashes = {}
    with path.open("xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in group:
            digest, count = hashlib.sha256(), 0
            for piece in tensor.pieces():
                data = np.ascontiguousarray(piece, tensor.dtype if piece.dtype == tensor.dtype else None).view(np.uint8).reshape(-1).data
                digest.update(data)
                file.write(data)
                count += len(data)
                note(len(data))
            if count != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {tensor.nbytes} bytes were planned, {count} came")
            hashes[tensor.name] = digest.hexdigest()
    return hashes
