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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxinfer.checkpoint import manifest, read
from jaxinfer.checkpoint.atomic import check_target, new_folder
from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats.find import FIELD
from jaxinfer.checkpoint.formats.folder import WeightFiles
from jaxinfer.checkpoint.layouts import Layout, layout_of, quantization_config
from jaxinfer.checkpoint.stored import module_of
from jaxinfer.checkpoint.write import Planned, Progress, write_files
from jaxinfer.models import find
from jaxinfer.models.graph import Graph, Quantization
from jaxinfer.models.weights import Source, transform_of
from jaxinfer.quant.find import find_scheme
from jaxinfer.quant.qarray import QSpec

FORMATS = ("safetensors", "orbax")
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

    factors: by the names of the graph's weights, a power of two for each input that its columns are divided by, and (a vector) what
    a norm in front of them is multiplied by; see calibrate.py. progress is called with (bytes done, bytes in all).

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
    graph = Graph.of(module, module.Config.from_hf(values), np.float32, quantization)
    with new_folder(target, overwrite=overwrite) as folder:
        if kind == "orbax":
            raise NotImplementedError
        return _safetensors(source, folder, graph, values, factors or {}, progress)


def _safetensors(
    source: Path, folder: Path, graph: Graph, values: Mapping[str, Any], factors: Mapping[str, np.ndarray], progress: Progress | None
) -> Converted:
    read.verify(source, graph)
    manifest.verify(source, weights=True)
    with WeightFiles(source) as files:
        planned, layouts, kept = plan(graph, files.tensors, factors)
        before = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in files.tensors.values())
        hashes = write_files(folder, planned, progress=progress)
    carry(source, folder, dict(values) | {FIELD: quantization_config(layouts, kept)})
    manifest.write(folder, hashes)
    carried = len(planned) - sum(len(layout.suffixes) for layout in layouts.values())
    return Converted(len(layouts), carried, before, sum(tensor.nbytes for tensor in planned))


def plan(
    graph: Graph, tensors: Mapping[str, Source], factors: Mapping[str, np.ndarray]
) -> tuple[list[Planned], dict[str, Layout], list[str]]:
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
                planned += _Matrix(module_of(tensor), tensors[tensor], spec, layout, factors.get(name)).planned()
            else:
                kept += [module_of(tensor)] if contracting else []
                planned.append(_as_it_is(tensor, tensors[tensor], factors.get(name)))
    return planned, layouts, kept


def carry(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """Copy tokenizer, templates and settings, and write config.json."""
    skipped = {"config.json", manifest.NAME, "model.safetensors.index.json"}
    for path in sorted({path for pattern in CARRIED for path in source.glob(pattern)}):
        if path.is_file() and path.name not in skipped:
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass
class _Matrix:
    """One module of the checkpoint on its way: values are made first, their scales kept until it is their turn."""

    module: str
    source: Source
    spec: QSpec
    layout: Layout
    factors: np.ndarray | None
    scales: list[np.ndarray] = field(default_factory=list)

    def planned(self) -> list[Planned]:
        """The module's tensors in the order in which they must be made."""
        made = {"values": self._values, "scales": lambda: iter(self.scales), "shape": lambda: iter([np.array(self.shape, np.int64)])}
        arrays = self.layout.arrays(self.shape)
        return [Planned(f"{self.module}.{suffix}", dtype, shape, made[kind]) for suffix, kind, dtype, shape in arrays]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] as in the file."""
        return self.source.shape[0], math.prod(self.source.shape[1:])

    def _values(self) -> Iterator[np.ndarray]:
        scheme, (out, inputs) = find_scheme(self.spec.scheme), self.shape
        blocks, rows = (1, self.layout.group or inputs), max(BLOCK // (4 * inputs), 1)
        self.scales.clear()
        for low in range(0, out, rows):
            piece = self.source.read((slice(low, min(low + rows, out)), slice(0, inputs)))
            if self.factors is not None:
                piece = piece.astype(np.float32) / self.factors[None]
            try:
                scales = scheme.scales(piece, blocks)
            except ValueError as error:
                raise CheckpointError(f"tensor {self.module + '.weight'!r}: {error}") from None
            self.scales.append(scales)
            yield self.layout.stored(scheme.values(piece, scales))


def _as_it_is(name: str, tensor: Source, factors: np.ndarray | None) -> Planned:
    """A tensor carried over, a norm's multiplied by powers of two."""

    def pieces() -> Iterator[np.ndarray]:
        yield from _rows(tensor, factors)

    return Planned(name, tensor.dtype, tensor.shape, pieces)


def _rows(tensor: Source, factors: np.ndarray | None) -> Iterator[Shaped[np.ndarray, "..."]]:
    first, *rest = tensor.shape or (1,)
    rest_of_index = [slice(0, size) for size in rest]
    rows = max(BLOCK // max(math.prod(rest) * tensor.dtype.itemsize, 1), 1)
    for low in range(0, first, rows):
        piece = tensor.read((slice(low, min(low + rows, first)), *rest_of_index) if tensor.shape else ())
        if factors is not None:
            piece = (piece.astype(np.float32) * factors[low : low + len(piece)]).astype(tensor.dtype)
        yield piece


def names(quantization: Quantization) -> Sequence[str]:
    """The schemes that a quantisation uses."""
    return sorted({quantization.scheme, *(scheme for _, scheme in quantization.rules)} - {"keep"})
