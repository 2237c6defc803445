"""Weights that are quantised in the checkpoint already become `QArray`s as they are: nothing is rounded a second time.

A format (formats/) says how each module of the file is stored. From that follow the description of our weight, which joins several modules
(`describe`), and its arrays, read slice by slice (`StoredLoader`): values go through the model file's transform like an unquantised weight,
scales and zeros through the same transform with one number for each group in place of its inputs. Whatever a file's scales stand for
(tensor, output, group, tile), here they have one row for each output: parts that are joined need not agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Shaped

from jaxinfer.checkpoint.assemble import Kept, assemble
from jaxinfer.checkpoint.errors import CheckpointError, broken
from jaxinfer.checkpoint.formats.find import FIELD
from jaxinfer.checkpoint.formats.quantised import Encoding, Format, Need, Stored
from jaxinfer.checkpoint.formats.safetensors import LazyTensor
from jaxinfer.checkpoint.formats.views import Spread
from jaxinfer.models.graph import Graph, Spec, check_experts
from jaxinfer.models.weights import Joined, Part, Slices, Source, Stacked, Transform, transform_of
from jaxinfer.quant import blocks as of_blocks
from jaxinfer.quant import int4
from jaxinfer.quant.qarray import FP8, INT8, PACKED, ZERO, QArray, QSpec
from jaxinfer.quant.qarray import describe as described
from jaxinfer.sharding import ArraySpec, Rules

INTEGERS = ("int32", "int64")
FLOATS = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")
VALUES = {"int8": INT8, "w8a8": INT8, "fp8": FP8, "int4": PACKED}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def describe(graph: Graph, form: Format, tensors: Mapping[str, LazyTensor], folder: Path) -> Graph:
    """An unquantised graph with its weights as a checkpoint's format stores them.

    Raises:
        CheckpointError: modules that are joined here are quantised in different ways, or sizes do not fit the format.
    """
    described_specs = []
    for name, spec, contracting in zip(graph.names, graph.specs, graph.contracting, strict=True):
        if isinstance(spec, QSpec):
            raise TypeError(f"{name} is described as quantised already")
        transform, layer = transform_of(name, graph.module.WEIGHTS)
        needs = transform.needs(graph.config, spec.shape, layer)
        encoding = encoding_of(form, needs, folder) if contracting else None
        if encoding is None:
            described_specs.append(spec)
            continue
        encoding = encoding._replace(ordered=encoding.ordered and _order(form, needs, tensors, folder) is not None)
        described_specs.append(_spec(spec, contracting, encoding, _narrow(encoding, needs, tensors), folder))
    return replace(graph, specs=tuple(described_specs))


def encoding_of(form: Format, names: Iterable[str], folder: Path) -> Encoding | None:
    """How the tensors (X.weight) that make up one of our weights are quantised; None: not at all.

    Raises:
        CheckpointError: not all in the same way.
    """
    found = {name: form.encoding(module_of(name)) for name in names}
    if len(set(found.values())) > 1:
        (one, first), (other, second) = next((a, b) for a in found.items() for b in found.items() if a[1] != b[1])
        raise broken(
            folder / "config.json", f"{module_of(one)} and {module_of(other)} quantised alike, as they are one matrix here",
            f"{_word(first)} and {_word(second)}",
        )  # fmt: skip
    return next(iter(found.values()))


def module_of(tensor: str) -> str:
    """The module's name of a tensor X.weight."""
    return tensor.removesuffix(".weight")


def check_need(listing: Path, name: str, need: Need, tensors: Mapping[str, LazyTensor]) -> str:
    """Test that a tensor is there, in one of its shapes and dtypes; the name by which it is.

    Raises:
        CheckpointError: it is not.
    """
    shapes = "shape " + " or ".join(str(list(shape)) for shape in need.shapes) + " as config.json asks for"
    name = need.other if name not in tensors and need.other in tensors else name
    floating, untold = need.dtypes == FLOATS, "config.json has no quantization_config that says how to read the weights"
    if name not in tensors:
        packed = floating and any(f"{module_of(name)}.{it}" in tensors for it in ("qweight", "weight_packed"))
        raise broken(listing, shapes, "no such tensor", tensor=name, remedy=untold if packed else "")
    tensor = tensors[name]
    if tensor.shape not in need.shapes:
        raise broken(tensor.file.path, shapes, f"{list(tensor.shape)}", tensor=name)
    if tensor.dtype.name not in need.dtypes:
        expected = "a floating dtype" if floating else "dtype " + " or ".join(need.dtypes)
        remedy = untold if floating and tensor.dtype == np.int8 else ""
        raise broken(tensor.file.path, expected, tensor.dtype.name, tensor=name, remedy=remedy)
    return name


@dataclass(frozen=True)
class StoredLoader:
    """Makes one quantised weight out of what a format found in the file, by the names of its unquantised tensors."""

    name: str
    spec: QSpec
    transform: Transform
    layer: str
    config: Any
    contracting: int
    sources: Mapping[str, Stored]

    def load(self, mesh: Mesh, rules: Rules) -> QArray:
        """The weight on the mesh."""
        spec, per_block = self.spec, _of_blocks(self.transform, self.config, self.spec, self.contracting)
        zeros = {name: stored.zeros for name, stored in self.sources.items() if stored.zeros is not None}

        def group_zeros(index: Slices) -> Shaped[np.ndarray, "..."]:
            return per_block.read(zeros, self.config, spec.scales.shape, self.layer, index)

        def scales(index: Slices) -> Shaped[np.ndarray, "..."]:
            if zeros and spec.zeros is None:
                group_zeros(index)  # where there should be none: the view raises where there is one
            found = per_block.read(self._views("scales"), self.config, spec.scales.shape, self.layer, index)
            return np.ascontiguousarray(found.astype(spec.scales.dtype))

        arrays = [assemble(spec.values, mesh, rules, Kept(self._values).get), assemble(spec.scales, mesh, rules, Kept(scales).get)]
        if spec.zeros is not None:
            arrays.append(assemble(spec.zeros, mesh, rules, lambda index: (group_zeros(index) + ZERO).astype(PACKED)))
        if spec.order is not None:
            order = np.asarray(next(iter(self.sources.values())).order, spec.order.dtype)  # `describe` has seen that it is everybody's
            arrays.append(assemble(spec.order, mesh, rules, lambda index: order[index]))
        return jax.block_until_ready(spec.make(arrays))

    def _values(self, index: Slices) -> Shaped[np.ndarray, "..."]:
        spec = self.spec
        ratio = spec.shape[-1] // spec.values.shape[-1]  # numbers in one stored value
        whole = (*index[:-1], slice(index[-1].start * ratio, index[-1].stop * ratio))
        found = self.transform.read(self._views("values"), self.config, spec.shape, self.layer, whole)
        if spec.values.dtype == PACKED:
            return int4.pack((found + ZERO).astype(np.uint8))
        return np.ascontiguousarray(found.astype(spec.values.dtype, copy=False))

    def _views(self, kind: str) -> dict[str, Source]:
        return {name: getattr(stored, kind) for name, stored in self.sources.items()}


def loader_of(name: str, graph: Graph, form: Format, tensors: Mapping[str, LazyTensor], listing: Path) -> tuple[StoredLoader, set[str]]:
    """The loader of one weight that `describe` described, and the tensors that it needs, each checked.

    Raises:
        CheckpointError: a tensor is missing or not as the format needs it.
    """
    transform, layer = transform_of(name, graph.module.WEIGHTS)
    place = graph.names.index(name)
    spec, contracting = graph.specs[place], graph.contracting[place]
    if not isinstance(spec, QSpec):
        raise TypeError(f"{name} is not described as quantised")
    sources, used = {}, set()
    for tensor, shape in transform.needs(graph.config, spec.shape, layer).items():
        module, matrix = module_of(tensor), _matrix(shape)
        encoding = form.encoding(module)
        used |= {check_need(listing, needed, need, tensors) for needed, need in form.needs(module, matrix).items()}
        sources[tensor] = _refined(form.stored(module, matrix, tensors), spec, contracting, encoding.group if encoding else None)
    return StoredLoader(name, spec, transform, layer, graph.config, contracting, sources), used


def _word(encoding: Encoding | None) -> str:
    if encoding is None:
        return "unquantised"
    return encoding.scheme + (f" in groups of {encoding.group}" if encoding.group else "") + (" with zeros" if encoding.zeros else "")


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _order(form: Format, needs: Mapping[str, tuple[int, ...]], tensors: Mapping[str, LazyTensor], folder: Path) -> tuple[int, ...] | None:
    """The order of the columns of one of our weights; None where it is that of the inputs.

    Raises:
        CheckpointError: a tensor is not as the format needs it, or parts of the weight have orders of their own.
    """
    found: dict[str, tuple[int, ...] | None] = {}
    for tensor, shape in needs.items():
        module, matrix = module_of(tensor), _matrix(shape)
        for needed, need in form.needs(module, matrix).items():
            check_need(folder, needed, need, tensors)
        found[module] = form.stored(module, matrix, tensors).order
    if len(set(found.values())) > 1:
        names = " and ".join(found)
        raise broken(
            folder, f"the inputs of {names} in one order, as they are one matrix here", "several (desc_act, actorder)",
            remedy="use a checkpoint made with desc_act false, static groups, or actorder weight",
        )  # fmt: skip
    return next(iter(found.values()))


def _narrow(encoding: Encoding, needs: Iterable[str], tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether all scales of a weight are bfloat16 in the file, as those that int4 makes itself."""
    names = [f"{module_of(name)}.{suffix}" for name in needs for suffix in ("weight_scale", "scales")]
    found = {tensors[name].dtype for name in names if name in tensors}
    return encoding.scheme == "int4" and found == {BFLOAT16}


def _spec(spec: ArraySpec, contracting: int, encoding: Encoding, narrow: bool, folder: Path) -> Spec:
    out = len(spec.shape) - contracting
    into, file = spec.shape[out:], folder / "config.json"
    if encoding.scheme == "int4" and encoding.group is not None and math.prod(into) % encoding.group:
        raise broken(file, f"a group size of {FIELD} that divides {math.prod(into)} inputs", encoding.group)
    groups = into if encoding.group is None else _box(into, encoding.group)
    try:
        made = described(
            spec, contracting, (*(1,) * out, *groups), VALUES[encoding.scheme],
            scheme=encoding.scheme, scale_dtype=BFLOAT16 if narrow else np.float32,
            extras=(*(("zeros",) if encoding.zeros else ()), *(("order",) if encoding.ordered else ())),
            activations="int8" if encoding.scheme == "w8a8" else "float",
        )  # fmt: skip
        check_experts(made)
        return made
    except ValueError as error:
        raise CheckpointError(f"{file}: {FIELD} does not fit the model: {error}") from None


def _box(into: tuple[int, ...], group: int) -> tuple[int, ...]:
    """The largest piece of a group of inputs that cuts our dimensions into equal boxes; scales are repeated for the other pieces."""
    longest = math.gcd(math.prod(into), group)
    pieces = (size for size in range(longest, 0, -1) if longest % size == 0)
    return next(box for size in pieces if (box := of_blocks.run(into, size)) is not None)


def _refined(stored: Stored, spec: QSpec, contracting: int, group: int | None) -> Stored:
    """Scales and zeros repeated where a group of the file is several boxes of ours."""
    if group is None:
        return stored
    count, ours = math.prod(spec.scales.shape[-contracting:]), math.prod(spec.blocks[-contracting:])
    if group == ours:
        return stored
    spread = [None if view is None else Spread(view, 1, group // ours, count) for view in (stored.scales, stored.zeros)]
    return Stored(stored.values, spread[0] or stored.scales, spread[1], stored.order)


def _of_blocks(transform: Transform, config: Any, spec: QSpec, contracting: int) -> Transform:
    """The transform with one number for each group of inputs: outputs stay as they are split, groups are merged into one dimension."""
    if isinstance(transform, Stacked):
        inner = replace(spec, values=_first(spec.values), scales=_first(spec.scales), zeros=None, smooth=None, order=None)
        return Stacked(_parts_of_blocks(transform.each, config, inner, contracting))
    return _parts_of_blocks(transform, config, spec, contracting)


def _parts_of_blocks(transform: Part | Joined, config: Any, spec: QSpec, contracting: int) -> Part | Joined:
    if isinstance(transform, Joined):
        return Joined(transform.axis, tuple(_part_of_blocks(part, config, spec, contracting) for part in transform.parts))
    return _part_of_blocks(transform, config, spec, contracting)


def _first(spec: ArraySpec) -> ArraySpec:
    """One element of the first dimension."""
    return ArraySpec(spec.shape[1:], spec.dtype, spec.axes[1:])


def _part_of_blocks(part: Part, config: Any, spec: QSpec, contracting: int) -> Part:
    outputs, split = len(spec.shape) - contracting, []
    for group in part.groups(config, spec.shape):
        if sum(map(len, split)) < outputs:
            split.append(group)
    return Part(part.name, lambda _: (*split, spec.scales.shape[outputs:]))
