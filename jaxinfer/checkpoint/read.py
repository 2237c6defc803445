"""A checkpoint folder becomes sharded arrays: checked by headers first, then read slice by slice straight into the mesh.

First every weight of the graph is looked up: each tensor that it is made of must be there, in the right shape and a floating dtype, and
no other tensor may be left over. Only then are arrays made: for each device's shard the model file's transform reads the slices that it
needs, they are cast (or quantised) and handed to the device. Host memory holds a few shards at a time, never the model.

What is not done here: downloading (hub.py), file formats (formats/), deciding names and shapes (the model file).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Shaped

from jaxinfer.checkpoint import manifest, orbax, stored
from jaxinfer.checkpoint.assemble import Kept, assemble
from jaxinfer.checkpoint.errors import CheckpointError, broken
from jaxinfer.checkpoint.formats.find import FIELD, format_of
from jaxinfer.checkpoint.formats.folder import WeightFiles
from jaxinfer.checkpoint.formats.quantised import Format, Need
from jaxinfer.checkpoint.formats.safetensors import LazyTensor
from jaxinfer.checkpoint.json_files import read_json
from jaxinfer.checkpoint.stored import FLOATS, INTEGERS, StoredLoader, check_need, loader_of
from jaxinfer.models.graph import Graph, Weight
from jaxinfer.models.weights import Slices, Transform, transform_of
from jaxinfer.quant.find import find_scheme
from jaxinfer.quant.qarray import QArray, QSpec
from jaxinfer.sharding import DEFAULT_RULES, ArraySpec, Rules

THREADS = 4
ROWS_BLOCK = 1 << 26  # bytes of whole rows that are looked at together to find their scales

Progress = Callable[[int, int], None]


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Where the folder has a manifest, this and the other small files are compared with it first.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    manifest.verify(folder, weights=False)
    return read_json(folder / "config.json")


def of_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what it says of quantised weights, which is not the model's but this package's to read."""
    return {name: value for name, value in config.items() if name != FIELD}


def as_stored(folder: Path, graph: Graph) -> Graph:
    """An unquantised graph with its weights as the folder's checkpoint has them: quantised, or as they are.

    Raises:
        CheckpointError: a format, or an option of it, that is not implemented; a model that does not fit it.
    """
    config = read_json(folder / "config.json")
    if orbax.written_here(config):
        return Graph.of(graph.module, graph.config, graph.dtype, orbax.quantization(config, folder / "config.json"))
    form = _format(folder)
    if form is None:
        return graph
    with WeightFiles(folder) as files:
        return stored.describe(graph, form, files.tensors, folder)


def holds(folder: Path, name: str) -> bool:
    """Whether the folder's checkpoint has a tensor of this name.

    Raises:
        CheckpointError: files that cannot be read.
    """
    with WeightFiles(folder) as files:
        return name in files.tensors


def verify(folder: Path, graph: Graph) -> None:
    """Check headers alone: that every weight of the graph is there in the right shape, and no other tensor. Takes milliseconds.

    Raises:
        CheckpointError: as `load`.
    """
    if orbax.written_here(read_json(folder / "config.json")):
        return orbax.verify(folder)
    with WeightFiles(folder) as files:
        _plan(files.listing, graph, files.tensors, _format(folder))


def load(folder: Path, graph: Graph, mesh: Mesh, rules: Rules = DEFAULT_RULES, *, progress: Progress | None = None) -> dict[str, Weight]:
    """Read a model's weights onto the mesh, in the graph's dtype or quantised as the graph says.

    progress is called with (bytes of weights done, bytes in all), from any thread.

    Raises:
        CheckpointError: a missing, extra, misshapen or damaged tensor or file; one message names file, tensor, expected and found.
    """
    if orbax.written_here(read_json(folder / "config.json")):
        return orbax.load(folder, graph, mesh, rules, progress=progress)
    manifest.verify(folder, weights=True)
    with WeightFiles(folder) as files:
        loaders = _plan(files.listing, graph, files.tensors, _format(folder))
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


def weights_of(graph: Graph, tensors: Mapping[str, LazyTensor], mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[Weight]:
    """The weights of an unquantised checkpoint's tensors, quantised as the graph says, one after another in its order.

    Raises:
        CheckpointError: as `load`.
    """
    listing = next(iter(tensors.values())).file.path
    for loader in _plan(listing, graph, tensors, None):
        yield loader.load(mesh, rules)


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
        dtype, pieces = self.spec.dtype, Kept(lambda index: self._cast(self._read(index), dtype))
        return jax.block_until_ready(assemble(self.spec, mesh, rules, pieces.get))

    def _quantised(self, spec: QSpec, mesh: Mesh, rules: Rules) -> QArray:
        """Scales come from whole rows, whatever slice of a row a device holds."""
        scheme, blocks = find_scheme(spec.scheme), spec.blocks
        ratio = spec.shape[-1] // spec.values.shape[-1]  # numbers in one stored value
        scales = Kept(lambda index: self._scales(scheme, index, spec))

        def make(index: Slices) -> Shaped[np.ndarray, "..."]:
            whole = (*index[:-1], slice(index[-1].start * ratio, index[-1].stop * ratio))
            touched = tuple(slice(part.start // block, -(-part.stop // block)) for part, block in zip(whole, blocks, strict=True))
            return scheme.values(self._read(whole), scales.get(touched))

        return spec.make([assemble(spec.values, mesh, rules, Kept(make).get), assemble(spec.scales, mesh, rules, scales.get)])

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
        if piece.dtype == dtype or _counts(self.spec):
            return np.ascontiguousarray(piece, dtype)
        with np.errstate(over="ignore"):
            cast = piece.astype(dtype)
        if float(ml_dtypes.finfo(dtype).max) < float(ml_dtypes.finfo(piece.dtype).max) and not _finite(cast) and _finite(piece):
            raise broken(
                self._where(), f"numbers that {dtype.name} can hold", f"larger ones in {piece.dtype.name}", remedy="use --dtype bfloat16"
            )
        return cast

    def _where(self) -> str:
        return ", ".join(f"{tensor.file.path}: tensor {name!r}" for name, tensor in self.sources.items())


def _counts(spec: ArraySpec | QSpec) -> bool:
    """Whether a weight is whole numbers: a table of token ids."""
    return isinstance(spec, ArraySpec) and spec.dtype.kind == "i"


def _format(folder: Path) -> Format | None:
    return format_of(read_json(folder / "config.json"), folder / "config.json")


def _plan(listing: Path, graph: Graph, tensors: Mapping[str, LazyTensor], form: Format | None) -> list[_Loader | StoredLoader]:
    """Look every weight up and check that the checkpoint holds exactly what the model needs."""
    loaders, used = [], set()
    for name, spec in zip(graph.names, graph.specs, strict=True):
        if form is not None and isinstance(spec, QSpec):
            loader, needs = loader_of(name, graph, form, tensors, listing)
        else:
            transform, layer = transform_of(name, graph.module.WEIGHTS)
            needs = transform.needs(graph.config, spec.shape, layer)
            for tensor, shape in needs.items():
                check_need(listing, tensor, Need((shape,), INTEGERS if _counts(spec) else FLOATS), tensors)
            loader = _Loader(name, spec, transform, layer, graph.config, {tensor: tensors[tensor] for tensor in needs})
        used.update(needs)
        loaders.append(loader)
    if form is not None:
        used.update(_empty(tensors, used, form.empty))
    _check_extra(tensors, used, (*graph.module.ignored(graph.config), *(() if form is None else form.unused)))
    return loaders


def _empty(tensors: Mapping[str, LazyTensor], used: set[str], patterns: tuple[str, ...]) -> set[str]:
    """The tensors of these patterns that nothing needs and that hold nothing but zeros: to leave them out changes nothing."""
    names = {name for name in set(tensors) - used if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    return {name for name in names if not tensors[name].read(tuple(slice(0, size) for size in tensors[name].shape)).any()}


def _check_extra(tensors: Mapping[str, LazyTensor], used: set[str], ignored: tuple[str, ...]) -> None:
    extra = sorted(name for name in set(tensors) - used if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored))
    if extra:
        more = f" ({len(extra) - 1} more like it)" if len(extra) > 1 else ""
        raise broken(
            tensors[extra[0]].file.path, "only tensors that the model uses", f"one that config.json does not ask for{more}", tensor=extra[0]
        )


def _finite(piece: np.ndarray) -> bool:
    return bool(np.isfinite(piece).all())
