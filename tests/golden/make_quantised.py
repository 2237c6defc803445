"""Makes golden files of quantised checkpoints: the model `grouped`, quantised and written by the compressed-tensors library, and what
Hugging Face computes with the files.

    PYTHON tests/golden/make_quantised.py          one folder for each scheme below `quantised`

PYTHON belongs to an environment of its own with torch, transformers and compressed-tensors; the tests need none of them. A folder
holds what the library wrote, and expected.npz: prompts and float32 logits with weights as the library reads them again, activations
as they are.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from make import expected
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
BY_TOKEN = {"strategy": "token", "dynamic": True}

# name -> weights, input activations
SCHEMES = {
    "w8a16": ({**INT8, "strategy": "channel"}, None),
    "w8a8": ({**INT8, "strategy": "channel"}, {**INT8, **BY_TOKEN}),
    "w4a16": ({**INT4, "symmetric": True, "group_size": 32}, None),
    "w4a16_zeros": ({**INT4, "symmetric": False, "group_size": 16}, None),
    "fp8": ({**FP8, "strategy": "channel"}, {**FP8, **BY_TOKEN}),
    "fp8_blocks": ({**FP8, "strategy": "block", "block_structure": [16, 32]}, {**FP8, **BY_TOKEN, "strategy": "group", "group_size": 32}),
}


def ranges(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest number behind each scale."""
    if args.strategy == QuantizationStrategy.GROUP:
        parts, dims = weight.unflatten(1, (-1, args.group_size)), 2
    elif args.strategy == QuantizationStrategy.BLOCK:
        high, wide = args.block_structure
        parts, dims = weight.unflatten(0, (-1, high)).unflatten(2, (-1, wide)), (1, 3)
    else:
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    return parts.amin(dims), parts.amax(dims)


def quantise(model: torch.nn.Module, name: str) -> None:
    """Give every linear module but the head the scales of its weights."""
    weights, activations = (None if args is None else QuantizationArgs(**args) for args in SCHEMES[name])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if (found := getattr(module, "quantization_scheme", None)) is None:
            continue
        scales, zeros = calculate_qparams(*ranges(module.weight.data, found.weights), found.weights)
        module.weight_scale.data = scales.to(module.weight_scale.dtype).reshape(module.weight_scale.shape)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zeros.to(module.weight_zero_point.dtype).reshape(module.weight_zero_point.shape)
        module.quantization_status = QuantizationStatus.FROZEN


def dequantised(model: torch.nn.Module, compressor: ModelCompressor) -> torch.nn.Module:
    """A plain float32 model with the weights that the library makes of what it wrote, computed in float32."""
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight_scale.data.float()
    compressor.decompress_model(model)
    plain = LlamaForCausalLM(LlamaConfig.from_pretrained(HERE / "grouped")).float().eval()
    weights = model.state_dict()
    plain.load_state_dict({name: weights[name].float() for name in plain.state_dict()})
    return plain


def make(name: str, folder: Path) -> None:
    """Write one golden folder."""
    model = AutoModelForCausalLM.from_pretrained(HERE / "grouped", dtype=torch.bfloat16).eval()
    quantise(model, name)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    read = dequantised(model, compressor)
    answers = expected(read, read.config.vocab_size)
    np.savez_compressed(folder / "expected.npz", **{name: answers[name] for name in ("tokens", "lengths", "logits")})


if __name__ == "__main__":
    for scheme in SCHEMES:
        target = HERE / "quantised" / scheme
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        make(scheme, target)
