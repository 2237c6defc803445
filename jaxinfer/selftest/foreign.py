"""Copies of a model as other tools quantise it, for rows that damage them: AWQ, GPTQ and fp8 in tiles.

Written word by word as the formats define it, apart from the loader that reads it. Rounding is plain; the model need not be good.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

GROUP, TILE = 16, 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
CONFIGS: Mapping[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [TILE, TILE]},
}


def write(source: Path, target: Path, kind: str) -> None:
    """An unquantised folder again, with the matrices of its layers quantised as `kind` of `CONFIGS`; without a manifest."""
    from jaxinfer.checkpoint.formats.folder import WeightFiles
    from jaxinfer.checkpoint.write import Planned, write_files

    make: Callable[[str, np.ndarray], dict[str, np.ndarray]] = {"awq": _awq, "gptq": _gptq, "fp8": _fp8}[kind]
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors: dict[str, np.ndarray] = {}
    with WeightFiles(source) as files:
        for name, tensor in files.tensors.items():
            values = tensor.read(tuple(slice(0, size) for size in tensor.shape))
            tensors |= make(name.removesuffix(".weight"), values) if name.endswith("_proj.weight") else {name: values}
    write_files(target, [Planned(name, it.dtype, it.shape, lambda it=it: iter([it])) for name, it in tensors.items()])
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": CONFIGS[kind]}
    (target / "config.json").write_text(json.dumps(config))


def _rounded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [out, in], zeros and scales [out, groups]: q in 0..15 and zeros in 1..15."""
    import numpy as np

    groups = values.astype(np.float32).reshape(values.shape[0], -1, GROUP)
    low, high = np.minimum(groups.min(axis=2), -1e-4), np.maximum(groups.max(axis=2), 1e-4)
    scales = ((high - low) / 14).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales), 1, 15).astype(np.uint32)
    q = np.clip(np.rint(groups / scales[:, :, None].astype(np.float32)) + zeros[:, :, None], 0, 15)
    return q.reshape(values.shape).astype(np.uint32), zeros, scales


def _words(numbers: np.ndarray) -> np.ndarray:
    """Eight numbers of the last dimension to an int32, low bits first."""
    import numpy as np

    shifts = np.arange(8, dtype=np.uint32) * np.uint32(4)
    return np.bitwise_or.reduce(numbers.reshape(*numbers.shape[:-1], -1, 8) << shifts, axis=-1).view(np.int32)


def _awq(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    q, zeros, scales = _rounded(values)

    def packed(numbers: np.ndarray) -> np.ndarray:
        turned = numbers.T.reshape(numbers.shape[1], -1, 8)[:, :, list(AWQ_ORDER)]
        return _words(turned.reshape(numbers.shape[1], -1))

    return {f"{name}.qweight": packed(q), f"{name}.qzeros": packed(zeros), f"{name}.scales": scales.T.copy()}


def _gptq(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    import numpy as np

    q, zeros, scales = _rounded(values)
    order = np.arange(values.shape[1], dtype=np.int32) // GROUP
    found = {f"{name}.qweight": _words(q).T.copy(), f"{name}.qzeros": _words(zeros.T - 1), f"{name}.scales": scales.T.copy()}
    return found | {f"{name}.g_idx": order}


def _fp8(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    import ml_dtypes
    import numpy as np

    wide = values.astype(np.float32)
    tiles = np.pad(wide, [(0, -size % TILE) for size in wide.shape])
    split = np.abs(tiles).reshape(tiles.shape[0] // TILE, TILE, tiles.shape[1] // TILE, TILE)
    scales = (np.maximum(split.max(axis=(1, 3)), 1e-4) / 448).astype(np.float32)
    spread = np.repeat(np.repeat(scales, TILE, 0), TILE, 1)[: wide.shape[0], : wide.shape[1]]
    return {f"{name}.weight": (wide / spread).astype(ml_dtypes.float8_e4m3fn), f"{name}.weight_scale_inv": scales}
