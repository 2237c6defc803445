"""Quantise once: a checkpoint becomes a quantised one, tensor by tensor, whole or not at all.

The source is checked by its headers, then each matrix is read a few rows at a time, quantised by the scheme exactly as the loader would do
it, and written in the layout of compressed-tensors, which other tools read as well, or as an Orbax checkpoint of our own arrays (orbax.py).
Everything else (norms, embeddings, tokenizer, templates) is carried over as it is. A manifest of hashes comes last. Host memory holds a few
tensors at a time. What is not done here: finding the model (hub.py), measuring activations (calibrate.py).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Shaped

from jaxinfer.checkpoint import manifest, orbax, read
from jaxinfer.checkpoint.atomic import check_target, new_folder
from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats.find import FIELD
from jaxinfer.checkpoint.formats.folder import WeightFiles
from jaxinfer.checkpoint.formats.safetensors import LazyTensor
from jaxinfer.checkpoint.formats.views import Scaled
from jaxinfer.checkpoint.layouts import Layout, layout_of, quantization_config
from jaxinfer.checkpoint.stored import module_of
from jaxinfer.checkpoint.write import Planned, Progress, write_files
from jaxinfer.models import find
from jaxinfer.models.graph import Graph, Quantization, Weight
from jaxinfer.models.weights import transform_of
from jaxinfer.quant.find import find_scheme
from jaxinfer.quant.qarray import QSpec
from jaxinfer.sharding import make_mesh

BLOCK = 1 << 24  # bytes of a matrix that are quantised together
CARRIED = ("*.json", "*.jinja", "tokenizer.model", "*.txt", "LICENSE*", "README.md")

Kind = Literal["safetensors", "orbax"]


class Converted(NamedTuple):
    """What came of it: matrices quantised, other tensors, bytes of weights before and after."""

    quantised: int
    carried: int
    bytes_before: int
    bytes_after: int


def convert(
    source: Path, target: Path, quantization: Quantization, *, kind: Kind = "safetensors", overwrite: bool = False,
    factors: Mapping[str, np.ndarray] | None = None, progress: Progress | None = None,
) -> Converted:  # fmt: skip
    """Quantise the model in a folder into another folder, which is there whole in the end or not at all.

    factors: for some of the graph's weights, a power of two for each input: matrices are divided by them before they are quantised, norms
    multiplied by them; see calibrate.py. progress is called with (bytes done, bytes in all).

    Raises:
        CheckpointError: the source is damaged or quantised already, or the target may not be written to.
        ConfigError: a scheme that does not take the model's shapes, a rule that matches nothing.
    """
    check_target(target, overwrite=overwrite)
    if target.exists() and target.resolve() == source.resolve():
        raise CheckpointError(f"--out {target} is the model itself; name another folder")
    values = read.read_config(source)
    if values.get(FIELD):
        raise CheckpointError(f"{source / 'config.json'}: the weights are quantised already ({FIELD}); quantise the original model")
    module = find.find(values.get("model_type"))
    config = module.Config.from_hf(values)
    with WeightFiles(source) as files:
        graph = Graph.of(module, config, _dtype(files.tensors), quantization)
        read.verify(source, graph)
        manifest.verify(source, weights=True)
        tensors = balanced(graph, files.tensors, factors or {})
        with new_folder(target, overwrite=overwrite) as folder:
            if kind == "orbax":
                made, hashes = _orbax(folder, graph, tensors, progress), {}
                described = orbax.quantization_config(quantization)
            else:
                made, hashes, described = _safetensors(folder, graph, tensors, progress)
            carry(source, folder, dict(values) | {FIELD: described})
            manifest.write(folder, hashes)
    before = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in files.tensors.values())
    return made._replace(bytes_before=before)


def balanced(graph: Graph, tensors: Mapping[str, LazyTensor], factors: Mapping[str, np.ndarray]) -> dict[str, LazyTensor]:
    """The tensors with factors applied as they are read."""
    found = dict(tensors)
    for name, spec, contracting in zip(graph.names, graph.specs, graph.contracting, strict=True):
        if name in factors:
            transform, layer = transform_of(name, graph.module.WEIGHTS)
            for tensor in transform.needs(graph.config, spec.shape, layer):
                found[tensor] = Scaled.of(tensors[tensor], factors[name], divided=contracting > 0)
    return found


def _safetensors(
    folder: Path, graph: Graph, tensors: Mapping[str, LazyTensor], progress: Progress | None
) -> tuple[Converted, dict[str, dict[str, str]], dict[str, Any]]:
    planned, layouts, kept = plan(graph, tensors)
    hashes = write_files(folder, planned, progress=progress)
    carried = len(planned) - sum(len(layout.suffixes) for layout in layouts.values())
    made = Converted(len(layouts), carried, 0, sum(tensor.nbytes for tensor in planned))
    return made, hashes, quantization_config(layouts, kept)


def _orbax(folder: Path, graph: Graph, tensors: Mapping[str, LazyTensor], progress: Progress | None) -> Converted:
    mesh = make_mesh({}, jax.local_devices(backend="cpu")[:1])
    done = 0

    def weights() -> Iterator[Weight]:
        nonlocal done
        for spec, weight in zip(graph.specs, read.weights_of(graph, tensors, mesh), strict=True):
            yield weight
            done += spec.nbytes
            if progress is not None:
                progress(done, graph.nbytes)

    size = orbax.save(folder, graph, weights())
    quantised = sum(isinstance(spec, QSpec) for spec in graph.specs)
    return Converted(quantised, len(graph.specs) - quantised, 0, size)


def plan(graph: Graph, tensors: Mapping[str, LazyTensor]) -> tuple[list[Planned], dict[str, Layout], list[str]]:
    """What will be written, the layout of each quantised module, and the modules of matrices that stay as they are."""
    planned: list[Planned] = []
    layouts: dict[str, Layout] = {}
    kept: list[str] = []
    for name, spec, contracting in zip(graph.names, graph.specs, graph.contracting, strict=True):
        transform, layer = transform_of(name, graph.module.WEIGHTS)
        for tensor in transform.needs(graph.config, spec.shape, layer):
            if isinstance(spec, QSpec):
                layout = layout_of(spec, contracting)
                layouts[module_of(tensor)] = layout
                planned += _Matrix(module_of(tensor), tensors[tensor], spec.scheme, layout).planned()
            else:
                kept += [module_of(tensor)] if contracting else []
                planned.append(_as_it_is(tensor, tensors[tensor]))
    return planned, layouts, kept


def carry(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """Copy tokenizer, templates and settings, and write config.json."""
    skipped = {"config.json", "model.safetensors.index.json", *manifest.NOT_LISTED}
    for path in sorted({path for pattern in CARRIED for path in source.glob(pattern)}):
        if path.is_file() and path.name not in skipped:
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass
class _Matrix:
    """One module of the checkpoint on its way: values are made first, their scales kept until it is their turn."""

    module: str
    source: LazyTensor
    scheme: str
    layout: Layout
    scales: list[np.ndarray] = field(default_factory=list)

    def planned(self) -> list[Planned]:
        """The module's tensors in the order in which they must be made."""
        shape = np.array(self.source.shape, np.int64)
        made = {"values": self._values, "scales": lambda: iter(self.scales), "shape": lambda: iter([shape])}
        arrays = self.layout.arrays((self.source.shape[0], self.source.shape[1]))
        return [Planned(f"{self.module}.{suffix}", dtype, size, made[kind]) for suffix, kind, dtype, size in arrays]

    def _values(self) -> Iterator[np.ndarray]:
        scheme, blocks = find_scheme(self.scheme), (1, self.layout.group or self.source.shape[1])
        self.scales.clear()
        for piece in _rows(self.source):
            try:
                scales = scheme.scales(piece, blocks)
            except ValueError as error:
                raise CheckpointError(f"{self.source.file.path}: tensor {self.source.name!r}: {error}") from None
            self.scales.append(scales)
            yield self.layout.stored(scheme.values(piece, scales))


def _as_it_is(name: str, tensor: LazyTensor) -> Planned:
    return Planned(name, tensor.dtype, tensor.shape, lambda: _rows(tensor))


def _rows(tensor: LazyTensor) -> Iterator[Shaped[np.ndarray, "..."]]:
    """A tensor in pieces of whole rows."""
    if not tensor.shape:
        yield tensor.read(())
        return
    rest = [slice(0, size) for size in tensor.shape[1:]]
    rows = max(BLOCK // max(math.prod(tensor.shape[1:]) * 4, 1), 1)
    for low in range(0, tensor.shape[0], rows):
        yield tensor.read((slice(low, min(low + rows, tensor.shape[0])), *rest))


def _dtype(tensors: Mapping[str, LazyTensor]) -> np.dtype:
    """The dtype of an unquantised checkpoint's tensors, float32 where they differ."""
    found = {tensor.dtype for tensor in tensors.values()}
    return found.pop() if len(found) == 1 else np.dtype(np.float32)
