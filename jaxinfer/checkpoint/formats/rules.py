"""Modules that are quantised in another way than the rest, or not at all, as GPTQModel's option `dynamic` says for GPTQ and AWQ.

`dynamic` is an object of patterns and options. A pattern is a regular expression that is matched from a module's first letter, after
"+:" or nothing, with options to use in place of the usual ones, or after "-:", for modules that are not quantised. The first that
matches counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from jaxinfer.checkpoint.errors import broken
from jaxinfer.checkpoint.formats.quantised import Options

BITS = (4, 8)
OF_THE_TOOLS = (
    "quant_method method bits group_size desc_act sym checkpoint_format format lm_head pack_dtype dynamic meta backend static_groups"
    " true_sequential damp_percent damp_auto_increment mse act_group_aware hyb_act dataset tokenizer quantizer model_name_or_path"
    " model_file_base_name model_seqlen block_name_to_quantize module_name_preceding_first_block quant_block_list batch_size pad_token_id"
    " max_input_length cache_block_outputs use_exllama use_cuda_fp16 disable_exllama exllama_config is_marlin_format"
    " modules_in_block_to_quantize"
)  # what AutoGPTQ, Optimum, GPTQModel and transformers write for both methods
OF_THE_SEARCH = "mse damp_percent damp_auto_increment static_groups act_group_aware true_sequential"  # they leave the layout as it is


@dataclass(frozen=True)
class Way:
    """How a module is quantised: bits, inputs that share a scale (None: all), whether zeros are all in the middle, whether inputs may
    be in another order."""

    bits: int
    group: int | None
    symmetric: bool
    ordered: bool = False


@dataclass(frozen=True)
class Rules:
    """The usual way, and the exceptions in their order; None: not quantised."""

    usual: Way
    exceptions: tuple[tuple[re.Pattern[str], Way | None], ...] = ()

    def of(self, module: str) -> Way | None:
        """How this module is quantised."""
        return next((way for pattern, way in self.exceptions if pattern.match(module)), self.usual)


def check_tools(options: Options, method: str, more: str = "") -> None:
    """Refuse options that those who write this method's checkpoints do not set, or set to what is not read here.

    more: options that this method alone has.

    Raises:
        CheckpointError: an option that is not implemented, by name.
    """
    options.one_of("method", (None, method))
    options.one_of("is_marlin_format", (None, False), remedy="use a checkpoint that is not packed for one kernel")
    options.one_of("pack_dtype", (None, "int32"))
    options.finish(f"{OF_THE_TOOLS} {more}")


def read_rules(options: Options, usual: Way) -> Rules:
    """The rules of a quantization_config with this usual way.

    Raises:
        CheckpointError: a pattern that is no regular expression, or an option that is not implemented, by name.
    """
    dynamic = options.inside("dynamic")
    if dynamic is None:
        return Rules(usual)
    exceptions = []
    for name in dynamic.values:
        try:
            pattern = re.compile(name[2:] if name[:2] in ("+:", "-:") else name)
        except re.error as error:
            raise broken(options.file, f"{dynamic.where} with regular expressions", f"{name!r} ({error})") from None
        exceptions.append((pattern, None if name.startswith("-:") else _instead(dynamic.inside(name), usual)))
    return Rules(usual, tuple(exceptions))


def _instead(options: Options | None, usual: Way) -> Way:
    if options is None:
        return usual
    options.finish(f"bits group_size sym desc_act {OF_THE_SEARCH}")
    return replace(
        usual,
        bits=options.one_of("bits", BITS, default=usual.bits),
        group=options.group_size("group_size", default=-1 if usual.group is None else usual.group),
        symmetric=options.one_of("sym", (True, False), default=usual.symmetric),
        ordered=options.one_of("desc_act", (True, False), default=usual.ordered),
    )
