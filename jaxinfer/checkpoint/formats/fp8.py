"""fp8 weights as Hugging Face's quant_method "fp8" stores them: e4m3 values with scales per tensor, per output, or per block.

X.weight float8_e4m3fn [out, in] with X.weight_scale (one number, or one for each output) or X.weight_scale_inv: where weight_block_size
is given [ceil(out / rows), ceil(in / columns)], as DeepSeek and transformers write it, else one number, as transformers does. Both
multiply: weight = value * scale (the second was named for the quantiser, which divides by it). Scales are floating, or powers of two as
float8_e8m0fnu where scale_fmt is "ue8m0". Activations are not quantised here, whatever activation_scheme says of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxinfer.checkpoint.errors import broken
from jaxinfer.checkpoint.formats.quantised import SCALE_DTYPES, Encoding, Format, ModuleNames, Need, Options, Stored
from jaxinfer.checkpoint.formats.safetensors import LazyTensor
from jaxinfer.checkpoint.formats.views import Column, Scales, Spread, Within
from jaxinfer.models.weights import Source

QUANT_METHOD = "fp8"
VALUES = ("float8_e4m3fn",)
KNOWN = (
    "quant_method activation_scheme fmt scale_fmt weight_block_size modules_to_not_convert modules_to_convert ignored_layers dequantize"
    " expert_dtype is_checkpoint_fp8_serialized"
)

Block = tuple[int, int]


def read(options: Options) -> Format:
    """The format that a quantization_config asks for.

    Raises:
        CheckpointError: an option that is not implemented, by name.
    """
    options.one_of("activation_scheme", ("dynamic", "static"), default="dynamic")
    options.one_of("fmt", ("e4m3", "float8_e4m3fn"), default="e4m3")
    options.one_of("scale_fmt", (None, "float", "ue8m0"))
    options.one_of("expert_dtype", (None, "fp8"))
    options.one_of("modules_to_convert", (None, []), remedy="use a checkpoint with nothing but its linear modules in fp8")
    options.finish(KNOWN)
    plain = ModuleNames((*options.words("modules_to_not_convert"), *options.words("ignored_layers")))
    return _Fp8(options, block_of(options, "weight_block_size"), plain)


def block_of(options: Options, name: str) -> Block | None:
    """Rows and columns that share a scale.

    Raises:
        CheckpointError: anything but two whole numbers above 0.
    """
    value = options.values.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(it) is int and it > 0 for it in value):
        raise broken(options.file, f"{options.where}.{name} = [rows, columns]", value)
    return value[0], value[1]


def scale_shapes(shape: tuple[int, int], block: Block | None) -> tuple[tuple[int, ...], ...]:
    """The shapes that scales of a matrix [out, in] may have in a file."""
    if block is not None:
        return ((-(-shape[0] // block[0]), -(-shape[1] // block[1])),)
    return (shape[0], 1), (shape[0],), (1,), (), (1, 1)


def rows_of_scales(tensor: LazyTensor, shape: tuple[int, int], block: Block | None) -> Source:
    """Scales in any of those shapes as one row for each output: [out, 1], or [out, blocks along the inputs]."""
    if block is not None:
        return Scales(Spread(tensor, 0, block[0], shape[0]), tensor)
    column = Column(tensor)
    return Scales(column if column.shape[0] == shape[0] else Spread(column, 0, shape[0], shape[0]), tensor)


@dataclass(frozen=True)
class _Fp8:
    options: Options
    block: Block | None
    plain: ModuleNames
    unused: tuple[str, ...] = ("*.input_scale", "*.activation_scale")
    empty: tuple[str, ...] = ()

    def encoding(self, module: str) -> Encoding | None:
        """fp8 for all but the head and the modules that the config excludes."""
        return None if module == "lm_head" or self.plain.has(module) else Encoding("fp8", None if self.block is None else self.block[1])

    def needs(self, module: str, shape: tuple[int, int]) -> dict[str, Need]:
        """The values and their scales."""
        first, second = self._scale_names(module)
        scale = Need(scale_shapes(shape, self.block), (*SCALE_DTYPES, "float8_e8m0fnu"), second)
        return {f"{module}.weight": Need((shape,), VALUES), first: scale}

    def stored(self, module: str, shape: tuple[int, int], tensors: Mapping[str, LazyTensor]) -> Stored:
        """The matrix as it is stored."""
        values, scale = tensors[f"{module}.weight"], next(tensors[name] for name in self._scale_names(module) if name in tensors)
        return Stored(Within(values, values), rows_of_scales(scale, shape, self.block))

    def _scale_names(self, module: str) -> tuple[str, str]:
        """The usual name and the other one."""
        plain, inverse = f"{module}.weight_scale", f"{module}.weight_scale_inv"
        return (plain, inverse) if self.block is None else (inverse, plain)
