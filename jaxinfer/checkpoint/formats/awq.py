"""AWQ int4 (Lin et al., arXiv 2306.00978), in the layout "gemm" of AutoAWQ and GPTQModel.

qweight int32 [in, out / 8] and qzeros int32 [in / group, out / 8]: eight outputs to a word, in the places 0 to 7 (low bits first) the
outputs 0 2 4 6 1 3 5 7; scales [in / group, out]. weight = (q - z) * s with q and z in 0..15, here both less 8; where zero_point is
false every z is 8. The option `sym` says nothing here: transformers writes its own default of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxinfer.checkpoint.errors import broken
from jaxinfer.checkpoint.formats.quantised import SCALE_DTYPES, Encoding, Format, ModuleNames, Need, Options, Stored
from jaxinfer.checkpoint.formats.rules import Rules, Way, check_tools, read_rules
from jaxinfer.checkpoint.formats.safetensors import LazyTensor
from jaxinfer.checkpoint.formats.views import Scales, Transposed, Unpacked, Within
from jaxinfer.models.weights import Source

QUANT_METHOD = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
EACH = 8
OWN = "zero_point version modules_to_not_convert do_fuse fuse_max_seq_len modules_to_fuse q_group_size w_bit"


def read(options: Options) -> Format:
    """The format that a quantization_config asks for.

    Raises:
        CheckpointError: an option that is not implemented, by name.
    """
    check_tools(options, QUANT_METHOD, OWN)
    remedy = "use a checkpoint packed for version gemm"
    for name in ("version", "format", "checkpoint_format"):
        options.one_of(name, (None, "gemm", "GEMM"), remedy=remedy)
    options.one_of("desc_act", (None, False))
    options.one_of("lm_head", (None, False))
    group = options.group_size("group_size", default=options.values.get("q_group_size"))
    zeros = options.one_of("zero_point", (True, False), default=True)
    usual = Way(options.one_of("bits", (4,), default=options.values.get("w_bit")), group, symmetric=not zeros)
    return _Awq(options, read_rules(options, usual), ModuleNames(options.words("modules_to_not_convert")))


@dataclass(frozen=True)
class _Awq:
    options: Options
    rules: Rules
    plain: ModuleNames
    unused: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()

    def encoding(self, module: str) -> Encoding | None:
        """int4 for all but the head and the modules that the config excludes."""
        way = None if module == "lm_head" or self.plain.has(module) else self.rules.of(module)
        if way is None:
            return None
        if way.bits != 4 or way.ordered:
            expected = f"{module} of 4 bits and in the order of its inputs, as AWQ's are"
            raise broken(self.options.file, expected, f"bits = {way.bits}, desc_act = {way.ordered}")
        return Encoding("int4", way.group, zeros=not way.symmetric)

    def _way(self, module: str) -> Way:
        way = self.rules.of(module)
        if way is None:
            raise KeyError(f"{module} is not quantised")
        return way

    def needs(self, module: str, shape: tuple[int, int]) -> dict[str, Need]:
        """qweight, qzeros and scales."""
        (out, inputs), group = shape, self._way(module).group or shape[1]
        if out % EACH or inputs % group:
            found = f"{module} of [{out}, {inputs}]"
            raise broken(self.options.file, f"outputs in eights and inputs in groups of {group} (quantization_config.group_size)", found)
        return {
            f"{module}.qweight": Need(((inputs, out // EACH),), ("int32",)),
            f"{module}.qzeros": Need(((inputs // group, out // EACH),), ("int32",)),
            f"{module}.scales": Need(((inputs // group, out),), SCALE_DTYPES),
        }

    def stored(self, module: str, shape: tuple[int, int], tensors: Mapping[str, LazyTensor]) -> Stored:
        """The matrix, unpacked and turned; zeros of a symmetric one are checked as they are read, with the scales."""
        packed, scales = tensors[f"{module}.qzeros"], tensors[f"{module}.scales"]
        unpacked = [Unpacked(it, 1, shape[0], offset=8, order=ORDER) for it in (tensors[f"{module}.qweight"], packed)]
        zeros: Source = Transposed(unpacked[1])
        if self._way(module).symmetric:
            zeros = Within(zeros, packed, 0, 0)
        return Stored(Transposed(unpacked[0]), Scales(Transposed(scales), scales), zeros)
