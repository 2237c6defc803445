"""A checkpoint folder becomes sharded arrays: checked by headers first, then read slice by slice straight into the mesh.

First every weight of the graph is looked up: each tensor that it is made of must be there, in the right shape and a floating dtype, and
no other tensor may be left over. Only then are arrays made: for each device's shard the model file's transform reads the slices that it
needs, they are cast (or quantised) and handed to the device. Host memory holds a few shards at a time, never the model.

What is not done here: downloading (hub.py), file formats (formats/), deciding names and shapes (the model file).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Shaped

from jaxinfer.checkpoint.errors import CheckpointError, broken
from jaxinfer.checkpoint.formats.folder import WeightFiles
from jaxinfer.checkpoint.formats.safetensors import LazyTensor
from jaxinfer.checkpoint.json_files import read_json
from jaxinfer.models.graph import Graph, Weight
from jaxinfer.models.weights import Slices, Transform, transform_of
from jaxinfer.quant.find import find_scheme
from jaxinfer.quant.qarray import QArray, QSpec
from jaxinfer.sharding import DEFAULT_RULES, ArraySpec, Rules, named

THREADS = 4
ROWS_BLOCK = 1 << 26  # bytes of whole rows that are looked at together to find their scales

Progress = Callable[[int, int], None]


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return read_json(folder / "config.json")


def verify(folder: Path, graph: Graph) -> None:
    """Check headers alone: that every weight of the graph is there in the right shape, and no other tensor. Takes milliseconds.

    Raises:
        CheckpointError: as `load`.
    """
    with WeightFiles(folder) as files:
        _plan(files.listing, graph, files.tensors)


def load(folder: Path, graph: Graph, mesh: Mesh, rules: Rules = DEFAULT_RULES, *, progress: Progress | None = None) -> dict[str, Weight]:
    """Read a model's weights onto the mesh, in the graph's dtype or quantised as the graph says.

    progress is called with (bytes of weights done, bytes in all), from any thread.

    Raises:
        CheckpointError: a missing, extra, misshapen or damaged tensor or file; one message names file, tensor, expected and found.
    """
    with WeightFiles(folder) as files:
        loaders = _plan(files.listing, graph, files.tensors)
        done, total = 0, graph.nbytes
        weights: dict[str, Weight] = {}
        with ThreadPoolExecutor(THREADS) as pool:
            tasks = [pool.submit(loader.load, mesh, rules) for loader in loaders]
            try:
                for loader, task in zip(loaders, tasks, strict=True):
                    weights[loader.name] = task.result()
                    done += loader.spec.nbytes
                    if progress is not None:
                        progress(done, total)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return weights


@dataclass(frozen=True)
class _Loader:
    """Makes one weight: its transform with the tensors it needs, and what it becomes."""

    name: str
    spec: ArraySpec | QSpec
    transform: Transform
    layer: str
    config: Any
    sources: Mapping[str, LazyTensor]

    def load(self, mesh: Mesh, rules: Rules) -> Weight:
        """The weight on the mesh, ready."""
        if isinstance(self.spec, QSpec):
            return jax.block_until_ready(self._quantised(self.spec, mesh, rules))
        dtype, pieces = self.spec.dtype, _Kept(lambda index: self._cast(self._read(index), dtype))
        return jax.block_until_ready(_assemble(self.spec, mesh, rules, pieces.get))

    def _quantised(self, spec: QSpec, mesh: Mesh, rules: Rules) -> QArray:
        """Scales come from whole rows, whatever slice of a row a device holds."""
        scheme, blocks = find_scheme(spec.scheme), spec.blocks
        ratio = spec.shape[-1] // spec.values.shape[-1]  # numbers in one stored value
        scales = _Kept(lambda index: self._scales(scheme, index, spec))

        def make(index: Slices) -> Shaped[np.ndarray, "..."]:
            whole = (*index[:-1], slice(index[-1].start * ratio, index[-1].stop * ratio))
            touched = tuple(slice(part.start // block, -(-part.stop // block)) for part, block in zip(whole, blocks, strict=True))
            return scheme.values(self._read(whole), scales.get(touched))

        return spec.make([_assemble(spec.values, mesh, rules, _Kept(make).get), _assemble(spec.scales, mesh, rules, scales.get)])

    def _scales(self, scheme: ModuleType, index: Slices, spec: QSpec) -> Shaped[np.ndarray, "..."]:
        """Scales of whole blocks, which are read a few rows at a time."""
        first, *rest = (slice(part.start * block, part.stop * block) for part, block in zip(index, spec.blocks, strict=True))
        bytes_of_row = 4 * max(math.prod(part.stop - part.start for part in rest), 1)
        step = max(ROWS_BLOCK // bytes_of_row // spec.blocks[0], 1) * spec.blocks[0]
        found = []
        for low in range(first.start, first.stop, step):
            try:
                found.append(scheme.scales(self._read((slice(low, min(low + step, first.stop)), *rest)), spec.blocks))
            except ValueError as error:
                raise CheckpointError(f"{self._where()}: {error}") from None
        return np.concatenate(found)

    def _read(self, index: Slices) -> np.ndarray:
        return self.transform.read(self.sources, self.config, self.spec.shape, self.layer, index)

    def _cast(self, piece: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """To the model's dtype; a number that overflows it is an error, not an infinity."""
        if piece.dtype == dtype:
            return np.ascontiguousarray(piece)
        with np.errstate(over="ignore"):
            cast = piece.astype(dtype)
        if float(ml_dtypes.finfo(dtype).max) < float(ml_dtypes.finfo(piece.dtype).max) and not _finite(cast) and _finite(piece):
            raise broken(
                self._where(), f"numbers that {dtype.name} can hold", f"larger ones in {piece.dtype.name}", remedy="use --dtype bfloat16"
            )
        return cast

    def _where(self) -> str:
        return ", ".join(f"{tensor.file.path}: tensor {name!r}" for name, tensor in self.sources.items())


@dataclass
class _Kept:
    """Remembers one weight's pieces while it is being made: devices that hold the same piece share one read."""

    make: Callable[[Slices], np.ndarray]
    pieces: dict[tuple[tuple[int, int], ...], np.ndarray] = field(default_factory=dict)

    def get(self, index: Slices) -> np.ndarray:
        """The piece, made when first asked for."""
        key = tuple((part.start, part.stop) for part in index)
        if key not in self.pieces:
            self.pieces[key] = self.make(index)
        return self.pieces[key]


def _assemble(spec: ArraySpec, mesh: Mesh, rules: Rules, piece: Callable[[Slices], np.ndarray]) -> Array:
    def callback(index: tuple[slice, ...] | None) -> np.ndarray:
        whole = (slice(None),) * len(spec.shape) if index is None else index
        return piece(tuple(slice(*part.indices(size)[:2]) for part, size in zip(whole, spec.shape, strict=True)))

    return jax.make_array_from_callback(spec.shape, named(spec, mesh, rules), callback)


def _plan(listing: Path, graph: Graph, tensors: Mapping[str, LazyTensor]) -> list[_Loader]:
    """Look every weight up and check that the checkpoint holds exactly what the model needs."""
    loaders, used = [], set()
    for name, spec in zip(graph.names, graph.specs, strict=True):
        transform, layer = transform_of(name, graph.module.WEIGHTS)
        needs = transform.needs(graph.config, spec.shape, layer)
        for tensor, shape in needs.items():
            _check_tensor(listing, tensor, shape, tensors)
        used.update(needs)
        sources = {tensor: tensors[tensor] for tensor in needs}
        loaders.append(_Loader(name, spec, transform, layer, graph.config, sources))
    _check_extra(tensors, used, graph.module.ignored(graph.config))
    return loaders


def _check_tensor(listing: Path, name: str, shape: tuple[int, ...], tensors: Mapping[str, LazyTensor]) -> None:
    if name not in tensors:
        raise broken(listing, f"shape {list(shape)} as config.json asks for", "no such tensor", tensor=name)
    tensor = tensors[name]
    if tensor.shape != shape:
        raise broken(tensor.file.path, f"shape {list(shape)} as config.json asks for", f"{list(tensor.shape)}", tensor=name)
    if not jax.numpy.issubdtype(tensor.dtype, np.floating):
        remedy = "quantised checkpoints are not read yet" if tensor.dtype == np.int8 else ""
        raise broken(tensor.file.path, "a floating dtype", tensor.dtype.name, tensor=name, remedy=remedy)


def _check_extra(tensors: Mapping[str, LazyTensor], used: set[str], ignored: tuple[str, ...]) -> None:
    extra = sorted(name for name in set(tensors) - used if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored))
    if extra:
        more = f" ({len(extra) - 1} more like it)" if len(extra) > 1 else ""
        raise broken(
            tensors[extra[0]].file.path, "only tensors that the model uses", f"one that config.json does not ask for{more}", tensor=extra[0]
        )


def _finite(piece: np.ndarray) -> bool:
    return bool(np.isfinite(piece).all())
