"""GPTQ int4 and int8 (Frantar et al., arXiv 2210.17323), as AutoGPTQ and GPTQModel write it.

qweight int32 [in * bits / 32, out]: eight inputs of 4 bits, or four of 8, to a word, low bits first; qzeros int32
[groups, out * bits / 32]: outputs in the same way; scales [groups, out]; g_idx int32 [in]: the group of each input, where desc_act is
true in any order. weight = (q - z) * s with q and z from 0, here both less half of their range. Checkpoints of format "gptq" hold z - 1
in place of z (so z of 4 bits reaches 16), those of format "gptq_v2" hold z. AutoGPTQ gives every matrix a bias, of zeros where the model
has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxinfer.checkpoint.errors import broken
from jaxinfer.checkpoint.formats.quantised import SCALE_DTYPES, Encoding, Format, ModuleNames, Need, Options, Stored, column_order
from jaxinfer.checkpoint.formats.rules import BITS, Rules, Way, check_tools, read_rules
from jaxinfer.checkpoint.formats.safetensors import LazyTensor
from jaxinfer.checkpoint.formats.views import Picked, Scales, Shifted, Transposed, Unpacked, Within
from jaxinfer.models.weights import Source

QUANT_METHOD = "gptq"
WORD = 32


def read(options: Options) -> Format:
    """The format that a quantization_config asks for.

    Raises:
        CheckpointError: an option that is not implemented, by name.
    """
    check_tools(options, QUANT_METHOD)
    options.one_of("lm_head", (None, True, False))
    named = "checkpoint_format" if options.values.get("checkpoint_format") is not None else "format"
    version = options.one_of(named, ("gptq", "gptq_v2"), default="gptq", remedy="use a checkpoint in the format gptq")
    usual = Way(
        options.one_of("bits", BITS), options.group_size("group_size"), options.one_of("sym", (True, False), default=True),
        options.one_of("desc_act", (True, False), default=False),
    )  # fmt: skip
    blocks = options.values.get("modules_in_block_to_quantize")
    inside = [name for names in blocks for name in names] if isinstance(blocks, list) and blocks else None
    if inside is not None and not all(isinstance(name, str) for name in inside):
        raise broken(options.file, "quantization_config.modules_in_block_to_quantize = lists of names", blocks)
    chosen = None if inside is None else ModuleNames(tuple(inside))
    return _Gptq(options, read_rules(options, usual), int(version == "gptq"), chosen)


@dataclass(frozen=True)
class _Gptq:
    options: Options
    rules: Rules
    less: int
    chosen: ModuleNames | None
    unused: tuple[str, ...] = ("*.g_idx",)
    empty: tuple[str, ...] = ("*.bias",)

    def encoding(self, module: str) -> Encoding | None:
        """int4 or int8 for every linear module of the layers, and for the head where lm_head is true."""
        found = bool(self.options.values.get("lm_head")) if module == "lm_head" else self.chosen is None or self.chosen.has(module)
        way = self.rules.of(module) if found else None
        if way is None:
            return None
        if way.bits == 8 and not way.symmetric:
            raise broken(self.options.file, f"{module} symmetric, as numbers of 8 bits have to be", "sym = False")
        return Encoding(f"int{way.bits}", way.group, zeros=not way.symmetric, ordered=way.ordered and way.group is not None)

    def _way(self, module: str) -> Way:
        way = self.rules.of(module)
        if way is None:
            raise KeyError(f"{module} is not quantised")
        return way

    def needs(self, module: str, shape: tuple[int, int]) -> dict[str, Need]:
        """qweight, qzeros and scales; g_idx where the order may be another one."""
        way, (out, inputs) = self._way(module), shape
        each, group = WORD // way.bits, way.group or inputs
        if out % each or inputs % each or inputs % group:
            found = f"{module} of [{out}, {inputs}]"
            raise broken(self.options.file, f"sizes in whole words of {each}, inputs in groups of {group} (group_size)", found)
        needed = {
            f"{module}.qweight": Need(((inputs // each, out),), ("int32",)),
            f"{module}.qzeros": Need(((inputs // group, out // each),), ("int32",)),
            f"{module}.scales": Need(((inputs // group, out),), SCALE_DTYPES),
        }
        return needed | ({f"{module}.g_idx": Need(((inputs,),), ("int32",))} if way.ordered else {})

    def stored(self, module: str, shape: tuple[int, int], tensors: Mapping[str, LazyTensor]) -> Stored:
        """The matrix, unpacked and turned; zeros of a symmetric one are checked as they are read, with the scales."""
        way, name = self._way(module), f"{module}.g_idx"
        middle = 1 << (way.bits - 1)
        values: Source = Transposed(Unpacked(tensors[f"{module}.qweight"], 0, shape[1], way.bits, middle))
        scales, packed = tensors[f"{module}.scales"], tensors[f"{module}.qzeros"]
        zeros: Source = Transposed(Shifted(Unpacked(packed, 1, shape[0], way.bits), self.less - middle))
        found: Source = Scales(Transposed(scales), scales)
        if way.symmetric:
            zeros = Within(zeros, packed, 0, 0)
        order = column_order(tensors[name], way.group or shape[1]) if name in tensors else None
        if order is None:
            return Stored(values, found, zeros)
        if not way.ordered and order.columns is not None:
            raise broken(tensors[name].file.path, "inputs in their order, as desc_act is false", "another one", tensor=name)
        if order.columns is not None:
            return Stored(Picked(values, order.columns), found, zeros, order.columns)
        return Stored(values, Picked(found, order.groups), Picked(zeros, order.groups))
