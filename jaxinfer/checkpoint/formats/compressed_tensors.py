"""The compressed-tensors format of llm-compressor and vLLM: int8, int4 and fp8 weights, as "int-quantized", "float-quantized" and
"pack-quantized" store them.

Plain ("int-quantized", "float-quantized", "naive-quantized"): X.weight int8 or e4m3 [out, in]. Packed ("pack-quantized"):
X.weight_packed int32 [out, ceil(in * bits / 32)], numbers with 2^(bits-1) added, low bits first, and X.weight_shape [out, in].
X.weight_scale is [1], [out, 1], [out, groups] or [row blocks, column blocks]; X.weight_zero_point, where weights are not symmetric, int32
[ceil(out * bits / 32), groups], packed along the outputs, or int8 [out, groups]. weight = (q - zero) * scale. X.weight_g_idx int32 [in]
says each column's group (actorder "group").

fp8 activations stay unquantised here, whatever the config says of them; int8 ones are quantised token by token ("w8a8") or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxinfer.checkpoint.errors import broken
from jaxinfer.checkpoint.formats.fp8 import Block, block_of, rows_of_scales, scale_shapes
from jaxinfer.checkpoint.formats.quantised import SCALE_DTYPES, Encoding, Format, ModuleNames, Need, Options, Stored, column_order
from jaxinfer.checkpoint.formats.safetensors import LazyTensor
from jaxinfer.checkpoint.formats.views import Picked, Scales, Shifted, Unpacked, Within
from jaxinfer.models.weights import Source

QUANT_METHOD = "compressed-tensors"
PLAIN = {"int-quantized": "int", "float-quantized": "float", "naive-quantized": ""}
PACKED = "pack-quantized"
KNOWN = (
    "quant_method config_groups format global_compression_ratio ignore kv_cache_scheme quantization_status sparsity_config transform_config"
    " version"
)
KNOWN_OF_WEIGHTS = (
    "num_bits type symmetric strategy group_size block_structure dynamic actorder observer observer_kwargs scale_dtype zp_dtype"
)


def read(options: Options) -> Format:
    """The format that a quantization_config asks for.

    Raises:
        CheckpointError: an option that is not implemented, by name.
    """
    options.finish(KNOWN)
    options.one_of("quantization_status", ("compressed", "frozen"), default="compressed")
    options.one_of("kv_cache_scheme", (None,), remedy="use a checkpoint without it; the KV cache is quantised by a flag here")
    options.one_of("transform_config", (None, {}), remedy="use a checkpoint whose weights are not rotated")
    if (sparsity := options.inside("sparsity_config")) is not None:
        sparsity.one_of("format", ("dense",), default="dense", remedy="use a checkpoint that is not sparse")
    groups = options.inside("config_groups")
    if groups is None:
        raise broken(options.file, f"{options.where}.config_groups, an object of groups", options.values.get("config_groups"))
    read = [group for name in groups.values if (group := groups.inside(name)) is not None]
    usual = options.values.get("format")
    return _CompressedTensors(tuple(_group(group, usual) for group in read), ModuleNames(options.words("ignore")))


@dataclass(frozen=True)
class _Group:
    """Modules that are quantised in one way."""

    options: Options
    names: ModuleNames
    every: bool  # all linear modules
    encoding: Encoding
    bits: int
    packed: bool
    block: Block | None

    @property
    def dtype(self) -> str:
        """Of the values, where they are not packed."""
        return "int8" if self.bits == 8 and self.encoding.scheme != "fp8" else "float8_e4m3fn"

    def scales(self, shape: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
        """The shapes that scales may have."""
        if self.encoding.group is None or self.block is not None:
            return scale_shapes(shape, self.block)
        if shape[1] % self.encoding.group:
            raise broken(self.options.file, f"inputs in groups of {self.encoding.group} ({self.options.where}.group_size)", shape[1])
        return ((shape[0], shape[1] // self.encoding.group),)


@dataclass(frozen=True)
class _CompressedTensors:
    groups: tuple[_Group, ...]
    plain: ModuleNames
    unused: tuple[str, ...] = ("*.input_scale", "*.weight_shape", "*.weight_g_idx")
    empty: tuple[str, ...] = ()

    def encoding(self, module: str) -> Encoding | None:
        """As the group says that names the module, or else the one for all linear modules."""
        group = self._group(module)
        return None if group is None else group.encoding

    def _group(self, module: str) -> _Group | None:
        if self.plain.has(module):
            return None
        named = next((group for group in self.groups if group.names.has(module)), None)
        return named or next((group for group in self.groups if group.every), None)

    def _of(self, module: str) -> _Group:
        group = self._group(module)
        if group is None:
            raise KeyError(f"{module} is not quantised")
        return group

    def needs(self, module: str, shape: tuple[int, int]) -> dict[str, Need]:
        """Values, scales, and zeros and the order of columns where the config asks for them."""
        group, (out, inputs) = self._of(module), shape
        each, scales = 32 // group.bits, group.scales(shape)
        if group.packed:
            needed = {f"{module}.weight_packed": Need(((out, -(-inputs // each)),), ("int32",))}
        else:
            needed = {f"{module}.weight": Need((shape,), (group.dtype,))}
        needed[f"{module}.weight_scale"] = Need(scales, SCALE_DTYPES)
        if group.encoding.zeros:
            shapes = [(it[0], it[1]) for it in scales if len(it) == 2]
            packed = [(-(-rows // each), columns) for rows, columns in shapes]
            needed[f"{module}.weight_zero_point"] = Need((*packed, *shapes), ("int32", "int8"))
        return needed | ({f"{module}.weight_g_idx": Need(((inputs,),), ("int32",))} if group.encoding.ordered else {})

    def stored(self, module: str, shape: tuple[int, int], tensors: Mapping[str, LazyTensor]) -> Stored:
        """The matrix that the module's tensors mean."""
        group, scale = self._of(module), tensors[f"{module}.weight_scale"]
        if group.packed:
            self._check_shape(tensors.get(f"{module}.weight_shape"), shape)
            values: Source = Unpacked(tensors[f"{module}.weight_packed"], 1, shape[1], group.bits, 1 << (group.bits - 1))
        else:
            values = tensors[f"{module}.weight"]
            values = Within(values, values) if group.encoding.scheme == "fp8" else values
        in_rows = group.encoding.group is None or group.block is not None
        scales = rows_of_scales(scale, shape, group.block) if in_rows else Scales(scale, scale)
        zeros = _zeros(tensors[f"{module}.weight_zero_point"], scales.shape, group.bits) if group.encoding.zeros else None
        if group.encoding.ordered and group.encoding.group is not None:
            order = column_order(tensors[f"{module}.weight_g_idx"], group.encoding.group)
            if order is not None and order.columns is not None:
                return Stored(Picked(values, order.columns), scales, zeros, order.columns)
            if order is not None:
                scales, zeros = Picked(scales, order.groups), None if zeros is None else Picked(zeros, order.groups)
        return Stored(values, scales, zeros)

    @staticmethod
    def _check_shape(tensor: LazyTensor | None, shape: tuple[int, int]) -> None:
        """weight_shape repeats what config.json says; where it says otherwise, one of the two is wrong."""
        if tensor is None:
            return
        found = tensor.read((slice(0, tensor.shape[0]),)) if len(tensor.shape) == 1 else np.zeros(0)
        if found.tolist() != list(shape):
            raise broken(tensor.file.path, f"the shape {list(shape)} as config.json asks for", found.tolist(), tensor=tensor.name)


def _zeros(tensor: LazyTensor, shape: tuple[int, ...], bits: int) -> Source:
    if tensor.dtype == np.int8:
        return Within(Shifted(tensor, 0), tensor, -(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    return Unpacked(tensor, 0, shape[0], bits, 1 << (bits - 1))


def _group(options: Options, usual: object) -> _Group:
    options.finish("targets weights input_activations output_activations format")
    options.one_of("output_activations", (None,), remedy="use a checkpoint that leaves outputs unquantised")
    weights, targets = options.inside("weights"), options.words("targets")
    if weights is None or not targets:
        raise broken(options.file, f"{options.where} with weights and targets", options.values)
    weights.finish(KNOWN_OF_WEIGHTS)
    bits, kind = weights.one_of("num_bits", (8, 4), default=8), weights.one_of("type", ("int", "float"), default="int")
    packed = _packed(options, options.values.get("format") or usual, kind, bits)
    zeros = not weights.one_of("symmetric", (True,) if bits == 8 else (True, False), default=True, remedy="use a symmetric checkpoint")
    group, block = _sharing(weights)
    weights.one_of("dynamic", (False,), default=False)
    order = weights.one_of("actorder", (None, "weight", "static", "group", "dynamic"))
    scheme = "fp8" if kind == "float" else "int4" if bits == 4 else _activations(options)
    names = ModuleNames(tuple(it for it in targets if it != "Linear"))
    mixed = order in ("group", "dynamic") and group is not None
    return _Group(weights, names, "Linear" in targets, Encoding(scheme, group, zeros, ordered=mixed), bits, packed, block)


def _packed(options: Options, layout: object, kind: str, bits: int) -> bool:
    """Whether numbers are packed into words, if the layout is one of those that there are for them."""
    if layout != PACKED and (not isinstance(layout, str) or layout not in PLAIN or PLAIN[layout] not in ("", kind)):
        expected = f"format {PACKED!r} or {kind + '-quantized'!r} for weights of type {kind!r}"
        raise broken(options.file, expected, layout, remedy="use a checkpoint saved in one of these formats")
    packed = layout == PACKED
    if (kind, packed) == ("float", True) or (bits == 4 and not packed):
        expected = f"{options.where}.weights that are int4 or int8 packed, or int8 or fp8 plain"
        raise broken(options.file, expected, f"{kind} of {bits} bits as {layout}")
    return packed


def _sharing(weights: Options) -> tuple[int | None, Block | None]:
    """The inputs that share a scale (None: all), and the tile where scales are those of tiles."""
    strategy = weights.one_of("strategy", ("tensor", "channel", "group", "block"), default="tensor")
    if strategy == "group":
        group = weights.group_size("group_size")
        if group is None:
            raise broken(weights.file, f"{weights.where}.group_size = a whole number above 0", weights.values.get("group_size"))
        return group, None
    if strategy != "block":
        return None, None
    written = weights.values.get("block_structure")
    parts = written.split("x") if isinstance(written, str) else []
    sizes = [int(it) for it in parts] if parts and all(it.isdigit() for it in parts) else written
    block = block_of(Options({"block_structure": sizes}, weights.file, weights.where), "block_structure")
    if block is None:
        raise broken(weights.file, f"{weights.where}.block_structure = [rows, columns]", None)
    return block[1], block


def _activations(options: Options) -> str:
    """The scheme of int8 weights: w8a8 where activations are int8 by token, int8 where they are left alone."""
    inputs = options.inside("input_activations")
    if inputs is None:
        return "int8"
    remedy = "use a checkpoint whose activations are quantised by token as they arrive"
    for name, wanted in {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}.items():
        inputs.one_of(name, (wanted,), remedy=remedy)
    return "w8a8"
