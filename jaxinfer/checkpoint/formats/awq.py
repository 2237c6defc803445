"""AWQ int4 (Lin et al., arXiv 2306.00978), in the layout "gemm" of AutoAWQ.

qweight int32 [in, out / 8] and qzeros int32 [in / group, out / 8]: eight outputs to a word, in the places 0 to 7 (low bits first) the
outputs 0 2 4 6 1 3 5 7; scales float16 [in / group, out]. weight = (q - z) * s with q and z in 0..15, here both less 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxinfer.checkpoint.errors import broken
from jaxinfer.checkpoint.formats.quantised import SCALE_DTYPES, Encoding, Format, ModuleNames, Need, Options, Stored
from jaxinfer.checkpoint.formats.safetensors import LazyTensor
from jaxinfer.checkpoint.formats.views import Scales, Transposed, Unpacked

QUANT_METHOD = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
EACH = 8
KNOWN = (
    "quant_method bits group_size zero_point version modules_to_not_convert backend do_fuse exllama_config fuse_max_seq_len modules_to_fuse"
    " q_group_size w_bit"
)


def read(options: Options) -> Format:
    """The format that a quantization_config asks for.

    Raises:
        CheckpointError: an option that is not implemented, by name.
    """
    options.one_of("bits", (4,), default=options.values.get("w_bit"))
    options.one_of("version", ("gemm", "GEMM"), default="gemm", remedy="use a checkpoint packed for version gemm")
    options.one_of("zero_point", (True,), default=True, remedy="use a checkpoint with zero points")
    options.finish(KNOWN)
    group = options.group_size("group_size", default=options.values.get("q_group_size"))
    return _Awq(options, group, ModuleNames(options.words("modules_to_not_convert")))


@dataclass(frozen=True)
class _Awq:
    options: Options
    group: int | None
    plain: ModuleNames
    unused: tuple[str, ...] = ()

    def encoding(self, module: str) -> Encoding | None:
        """int4 with zeros for all but the head and the modules that the config excludes."""
        return None if module == "lm_head" or self.plain.has(module) else Encoding("int4", self.group, zeros=True)

    def needs(self, module: str, shape: tuple[int, int]) -> dict[str, Need]:
        """qweight, qzeros and scales."""
        (out, inputs), group = shape, self.group or shape[1]
        if out % EACH or inputs % group:
            found = f"{module} of [{out}, {inputs}]"
            raise broken(self.options.file, f"outputs in eights and inputs in groups of {group} (quantization_config.group_size)", found)
        return {
            f"{module}.qweight": Need(((inputs, out // EACH),), ("int32",)),
            f"{module}.qzeros": Need(((inputs // group, out // EACH),), ("int32",)),
            f"{module}.scales": Need(((inputs // group, out),), SCALE_DTYPES),
        }

    def stored(self, module: str, shape: tuple[int, int], tensors: Mapping[str, LazyTensor]) -> Stored:
        """The matrix, unpacked and turned."""
        unpacked = [Unpacked(tensors[f"{module}.{it}"], 1, shape[0], offset=8, order=ORDER) for it in ("qweight", "qzeros")]
        scales = tensors[f"{module}.scales"]
        return Stored(Transposed(unpacked[0]), Scales(Transposed(scales), scales), Transposed(unpacked[1]))
