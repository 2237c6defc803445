"""Writes safetensors files by hand, whole ones and broken ones, for tests of the loader."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from jaxinfer.checkpoint.formats.safetensors import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def header_of(tensors: Mapping[str, np.ndarray]) -> dict:
    """The header that describes these tensors, one after another."""
    header, at = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": NAMES[values.dtype], "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    return header


def write(path: Path, tensors: Mapping[str, np.ndarray], edit: Callable[[dict], object] | None = None) -> Path:
    """Write a file; `edit` may change the header first, or return bytes to write in its place."""
    header = header_of(tensors)
    edited = edit(header) if edit is not None else None
    raw = edited if isinstance(edited, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(values.tobytes() for values in tensors.values()))
    return path


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file, through the loader's reader."""
    from jaxinfer.checkpoint.formats.safetensors import SafetensorsFile

    file = SafetensorsFile(path)
    try:
        return {name: tensor.read(tuple(slice(0, size) for size in tensor.shape)) for name, tensor in file.tensors().items()}
    finally:
        file.close()
