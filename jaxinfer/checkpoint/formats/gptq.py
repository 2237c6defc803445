"""GPTQ int4 (Frantar et al., arXiv 2210.17323), as AutoGPTQ and GPTQModel write it.

qweight int32 [in / 8, out]: eight inputs to a word, low bits first; qzeros int32 [groups, out / 8]: eight outputs to a word; scales
float16 [groups, out]; g_idx int32 [in]: the group of each input. weight = (q - z) * s with q and z in 0..15, here both less 8. Checkpoints
of format "gptq" hold z - 1 in place of z (so z reaches 16), those of format "gptq_v2" hold z.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxinfer.checkpoint.errors import broken
from jaxinfer.checkpoint.formats.quantised import SCALE_DTYPES, Encoding, Format, ModuleNames, Need, Options, Stored, group_order
from jaxinfer.checkpoint.formats.safetensors import LazyTensor
from jaxinfer.checkpoint.formats.views import Picked, Scales, Shifted, Transposed, Unpacked, Within

QUANT_METHOD = "gptq"
EACH = 8
KNOWN = (
    "quant_method bits group_size desc_act sym checkpoint_format static_groups true_sequential damp_percent damp_auto_increment dataset"
    " tokenizer model_name_or_path model_file_base_name model_seqlen block_name_to_quantize module_name_preceding_first_block batch_size"
    " pad_token_id use_exllama use_cuda_fp16 disable_exllama exllama_config max_input_length cache_block_outputs backend meta lm_head"
    " pack_dtype dynamic mse quant_block_list format modules_in_block_to_quantize act_group_aware hyb_act"
)


def read(options: Options) -> Format:
    """The format that a quantization_config asks for.

    Raises:
        CheckpointError: an option that is not implemented, by name.
    """
    options.one_of("bits", (4,))
    options.one_of("desc_act", (True, False), default=False)
    options.one_of("lm_head", (True, False), default=False)
    options.one_of("pack_dtype", ("int32",), default="int32")
    options.one_of("dynamic", (None, {}), remedy="modules quantised each in its own way are not implemented")
    named = "checkpoint_format" if "checkpoint_format" in options.values else "format"
    version = options.one_of(named, ("gptq", "gptq_v2"), default="gptq", remedy="use a checkpoint in the format gptq")
    options.finish(KNOWN)
    symmetric = options.one_of("sym", (True, False), default=True)
    blocks = options.values.get("modules_in_block_to_quantize")
    inside = [name for names in blocks for name in names] if isinstance(blocks, list) and blocks else None
    if inside is not None and not all(isinstance(name, str) for name in inside):
        raise broken(options.file, "quantization_config.modules_in_block_to_quantize = lists of names", blocks)
    chosen = None if inside is None else ModuleNames(tuple(inside))
    return _Gptq(options, options.group_size("group_size"), bool(symmetric), int(version == "gptq"), chosen)


@dataclass(frozen=True)
class _Gptq:
    options: Options
    group: int | None
    symmetric: bool
    less: int
    chosen: ModuleNames | None
    unused: tuple[str, ...] = ("*.g_idx",)

    def encoding(self, module: str) -> Encoding | None:
        """int4 for every linear module of the layers, and for the head where lm_head is true."""
        quantised = bool(self.options.values.get("lm_head")) if module == "lm_head" else self.chosen is None or self.chosen.has(module)
        return Encoding("int4", self.group, zeros=not self.symmetric) if quantised else None

    def needs(self, module: str, shape: tuple[int, int]) -> dict[str, Need]:
        """qweight, qzeros and scales; g_idx where the order may be another one."""
        (out, inputs), group = shape, self.group or shape[1]
        if out % EACH or inputs % EACH or inputs % group:
            found = f"{module} of [{out}, {inputs}]"
            raise broken(self.options.file, f"sizes in eights, inputs in groups of {group} (quantization_config.group_size)", found)
        needed = {
            f"{module}.qweight": Need(((inputs // EACH, out),), ("int32",)),
            f"{module}.qzeros": Need(((inputs // group, out // EACH),), ("int32",)),
            f"{module}.scales": Need(((inputs // group, out),), SCALE_DTYPES),
        }
        return needed | ({f"{module}.g_idx": Need(((inputs,),), ("int32",))} if self.options.values.get("desc_act") else {})

    def stored(self, module: str, shape: tuple[int, int], tensors: Mapping[str, LazyTensor]) -> Stored:
        """The matrix, unpacked and turned; zeros of a symmetric one are checked as they are read, with the scales."""
        name, group = f"{module}.g_idx", self.group or shape[1]
        order = group_order(tensors[name], group) if name in tensors else None
        values = Transposed(Unpacked(tensors[f"{module}.qweight"], 0, shape[1], offset=8))
        scales, packed = tensors[f"{module}.scales"], tensors[f"{module}.qzeros"]
        zeros = Transposed(Shifted(Unpacked(packed, 1, shape[0]), self.less - 8))
        found = Scales(Transposed(scales), scales)
        if self.symmetric:
            zeros = Within(zeros, packed, 0, 0)
        if order is None:
            return Stored(values, found, zeros)
        return Stored(values, Picked(found, order), Picked(zeros, order))
