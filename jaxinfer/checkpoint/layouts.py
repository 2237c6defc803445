"""How each scheme is written in the layout of compressed-tensors, and the quantization_config that says so.

int8 and int4 weights are "pack-quantized" (four or eight numbers to an int32, 2^(bits-1) added), those with int8 activations
"int-quantized", fp8 "float-quantized": what llm-compressor writes for the same schemes, so that vLLM and transformers read it.
formats/compressed_tensors.py reads it back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.quant.qarray import FP8, INT8, PACKED, QSpec

INT32 = np.dtype(np.int32)


class Layout(NamedTuple):
    """How one module is written. group: inputs to a scale; None: all of them."""

    format: str
    bits: int
    kind: str
    group: int | None
    scale_dtype: np.dtype
    activations: bool

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The module's tensors, values first."""
        packed = self.format == "pack-quantized"
        return ("weight_packed", "weight_scale", "weight_shape") if packed else ("weight", "weight_scale")

    def arrays(self, shape: tuple[int, int]) -> list[tuple[str, str, np.dtype, tuple[int, ...]]]:
        """Suffix, kind ("values", "scales", "shape"), dtype and shape of each tensor of a matrix [out, in]."""
        out, inputs = shape
        scales = ("weight_scale", "scales", self.scale_dtype, (out, inputs // (self.group or inputs)))
        if self.format != "pack-quantized":
            return [("weight", "values", INT8 if self.kind == "int" else FP8, shape), scales]
        words = -(-inputs * self.bits // 32)
        return [("weight_packed", "values", INT32, (out, words)), scales, ("weight_shape", "shape", np.dtype(np.int64), (2,))]

    def stored(self, values: Shaped[np.ndarray, "rows columns"]) -> Shaped[np.ndarray, "rows words"]:
        """A scheme's values as the file has them: bytes become words where it is packed."""
        if self.format != "pack-quantized":
            return values
        unsigned = values if values.dtype == PACKED else (values.astype(np.int16) + 128).astype(np.uint8)
        padded = np.pad(unsigned, ((0, 0), (0, -unsigned.shape[1] % 4)))
        return np.ascontiguousarray(padded).view("<i4")

    def weights(self) -> dict[str, Any]:
        """What config.json says of such weights."""
        return {
            "num_bits": self.bits, "type": self.kind, "symmetric": True, "strategy": "group" if self.group else "channel",
            "group_size": self.group, "block_structure": None, "dynamic": False, "actorder": None, "observer": "minmax",
            "observer_kwargs": {},
        }  # fmt: skip

    def inputs(self) -> dict[str, Any] | None:
        """What config.json says of its activations."""
        if not self.activations:
            return None
        return {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "group_size": None, "block_structure": None,
            "dynamic": True, "actorder": None, "observer": None, "observer_kwargs": {},
        }  # fmt: skip


def layout_of(spec: QSpec, contracting: int) -> Layout:
    """The layout of a weight that a scheme described.

    Raises:
        CheckpointError: it has scales that are not one for each output and group of inputs, or zeros.
    """
    out = len(spec.shape) - contracting
    if spec.blocks[:out] != (1,) * out or len(spec.arrays) != 2:
        raise CheckpointError(f"scheme {spec.scheme!r} has no layout in compressed-tensors here; write --format orbax")
    inputs, group = math.prod(spec.shape[out:]), math.prod(spec.blocks[out:])
    kinds = {INT8: ("int", 8), PACKED: ("int", 4), FP8: ("float", 8)}
    kind, bits = kinds[spec.values.dtype]
    activations = spec.activations == "int8"
    form = "float-quantized" if kind == "float" else "int-quantized" if activations else "pack-quantized"
    return Layout(form, bits, kind, None if group == inputs else group, spec.scales.dtype, activations)


def quantization_config(layouts: Mapping[str, Layout], kept: Sequence[str]) -> dict[str, Any]:
    """The quantization_config for modules in these layouts, beside others that stay as they are."""
    modules: dict[Layout, list[str]] = {}
    for module, layout in layouts.items():
        modules.setdefault(layout, []).append(module)
    usual = max(modules, key=lambda layout: len(modules[layout]), default=None)
    ordered = sorted(modules, key=lambda layout: layout == usual)
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if layout == usual else sorted(modules[layout]), "weights": layout.weights(),
            "input_activations": layout.inputs(), "output_activations": None, "format": layout.format,
        }
        for number, layout in enumerate(ordered)
    }  # fmt: skip
    formats = {layout.format for layout in modules}
    return {
        "quant_method": "compressed-tensors", "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed", "config_groups": groups, "ignore": sorted({*kept, "lm_head"} - set(layouts)),
        "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip
