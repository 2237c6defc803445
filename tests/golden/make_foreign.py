"""Makes golden files of checkpoints as the libraries that people quantise with write them, and what each library makes of its own files.

    PYTHON tests/golden/make_foreign.py LIBRARY...      the folders of these libraries (see MAKERS) below `foreign`

PYTHON belongs to an environment of its own; the tests need none. Made with torch 2.13.0+cpu, all on a CPU:

    gptqmodel autoawq llmcompressor transformers: gptqmodel 7.7.0, autoawq 0.2.9, llmcompressor 0.14.0.1, compressed-tensors 0.20.1 and
        transformers 5.24.0 (installed without their dependencies: llmcompressor asks for older ones)
    autogptq: auto-gptq 0.7.1 with transformers 4.42.4, numpy 1.26.4

A folder holds what the library wrote, weights and config.json, and expected.npz: a prompt, float32 logits with the weights that the
library unpacks (`dequantised` of each maker), and each quantised matrix times `probe`. Where a library asks for a GPU that it
does not need, it is told that there is one; nothing of what it computes or writes is changed.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
FOLDER = Path(__file__).parent / "foreign"
VOCABULARY = 32
NO_QKV = r"-:.*self_attn\.[qkv]_proj"
EIGHT = {"bits": 8, "group_size": 64, "sym": True}
Weights = dict[str, torch.Tensor]

GPTQMODEL = {
    "gptq": dict(group_size=32, sym=False, desc_act=False),
    "gptq_v2": dict(group_size=64, sym=False, desc_act=False, format="gptq_v2"),
    "gptq_symmetric": dict(group_size=128, sym=True, desc_act=False),
    "gptq_whole": dict(group_size=-1, sym=False, desc_act=False, act_group_aware=False),
    "gptq_order": dict(group_size=32, sym=False, desc_act=True),
    "gptq_mixed": dict(group_size=32, sym=True, desc_act=False, lm_head=True, dynamic={NO_QKV: {}, "+:.*down_proj": EIGHT}),
    "awq": dict(group_size=32, sym=False, method="awq", format="gemm"),
    "awq_symmetric": dict(group_size=128, sym=True, method="awq", format="gemm"),
}
AUTOGPTQ = {"autogptq": dict(group_size=32, sym=False, desc_act=False), "autogptq_order": dict(group_size=32, sym=True, desc_act=True)}
FP8 = {
    "fp8_tiles": dict(weight_block_size=(64, 64)),
    "fp8_powers": dict(weight_block_size=(32, 64), scale_fmt="ue8m0"),
    "fp8_static": dict(weight_block_size=None, activation_scheme="static"),
}


def config(hidden: int) -> LlamaConfig:
    """One layer; sizes in whole groups of 128 where hidden is 128."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=128, num_hidden_layers=1, num_attention_heads=hidden // 32,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip


def base(hidden: int = 64) -> Path:
    """A random model in float16 for a library to read."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(hidden))
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        parameter.data = 1 + 0.2 * noise if parameter.ndim == 1 else 1.2 * noise / parameter.shape[-1] ** 0.5
    folder = Path(tempfile.mkdtemp())
    model.half().save_pretrained(folder)
    demo = Path(__file__).parents[2] / "checkpoints" / "demo"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder)
    return folder


def samples() -> list[list[int]]:
    """What the libraries calibrate with."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (48,), generator=generator).tolist() for _ in range(16)]


def examples() -> list[dict[str, list[int]]]:
    """The same as GPTQ's libraries take it."""
    return [{"input_ids": tokens, "attention_mask": [1] * 48} for tokens in samples()]


def keep(name: str, written: Path, dequantised: Callable[[Path], Weights]) -> None:
    """Move what a library wrote into the golden folder and add what it makes of it."""
    target = FOLDER / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in written.iterdir():
        if file.name == "config.json" or file.suffix == ".safetensors":  # AutoGPTQ has a name of its own for it
            shutil.copy(file, target / ("model.safetensors" if file.suffix == ".safetensors" else file.name))
    weights = {key: value.float() for key, value in dequantised(target).items()}
    plain = LlamaForCausalLM(config(weights["model.norm.weight"].shape[0])).float().eval()
    plain.load_state_dict(weights)
    tokens = np.random.default_rng(7).integers(0, VOCABULARY, 17)
    with torch.no_grad():
        logits = plain(torch.tensor(tokens[None]), use_cache=False).logits[0].numpy()
    stored = load_file(target / "model.safetensors")
    matrices = [key for key in sorted(weights) if key not in stored or stored[key].dtype == torch.float8_e4m3fn]
    products = {key: (weights[key].double() @ torch.tensor(probe(weights[key].shape[1]))).float().numpy() for key in matrices}
    np.savez_compressed(target / "expected.npz", tokens=tokens, logits=logits, **products)
    print(name, len(products), "matrices", flush=True)


def probe(size: int) -> np.ndarray:
    """What matrices are multiplied by."""
    return np.cos(np.arange(1, size + 1, dtype=np.float64) ** 2)


def rest(folder: Path, suffixes: tuple[str, ...]) -> Weights:
    """The tensors that are no part of a quantised matrix."""
    return {key: value for key, value in load_file(folder / "model.safetensors").items() if not key.endswith(suffixes)}


PACKED = (".qweight", ".qzeros", ".scales", ".g_idx", "proj.bias")


def gptqmodel() -> None:
    """GPTQModel: GPTQ in both formats, AWQ."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    def dequantised(folder: Path) -> Weights:
        found, tensors, copy = rest(folder, PACKED), load_file(folder / "model.safetensors"), base()  # it wants a tokenizer
        for file in folder.iterdir():
            shutil.copy(file, copy)
        awq = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
        model = GPTQModel.load(str(copy), backend=BACKEND.TORCH_AWQ if awq else BACKEND.TORCH, device="cpu").model
        for name, module in model.named_modules():
            if not isinstance(module, BaseQuantLinear):
                continue
            module.scales = tensors[f"{name}.scales"].float()  # it has rounded them to the model's dtype
            if awq:
                turned = dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size)
            else:
                turned = type(module).dequantize_weight(module)
            found[f"{name}.weight"] = turned.T.contiguous()
        return found

    for name, options in GPTQMODEL.items():
        source, written = base(128 if options["group_size"] == 128 else 64), Path(tempfile.mkdtemp())
        model = GPTQModel.load(str(source), QuantizeConfig(bits=4, offload_to_disk=False, **options))
        model.quantize(examples(), batch_size=4)
        model.save(str(written))
        keep(name, written, dequantised)


def autoawq() -> None:
    """AutoAWQ."""
    from awq import AutoAWQForCausalLM
    from awq.utils.packing_utils import dequantize_gemm
    from transformers import AutoTokenizer

    def dequantised(folder: Path) -> Weights:
        found, tensors = rest(folder, PACKED), load_file(folder / "model.safetensors")
        for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
            packed = [tensors[f"{name}.{it}"] for it in ("qweight", "qzeros")]
            found[f"{name}.weight"] = dequantize_gemm(*packed, tensors[f"{name}.scales"].float(), 4, 64).T.contiguous()
        return found

    source, written = base(), Path(tempfile.mkdtemp())
    model = AutoAWQForCausalLM.from_pretrained(str(source), device_map="cpu", safetensors=True)
    options = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    model.quantize(AutoTokenizer.from_pretrained(source), options, samples(), max_calib_seq_len=48, max_calib_samples=16)
    model.save_quantized(str(written))
    keep("autoawq", written, dequantised)


def autogptq() -> None:
    """AutoGPTQ, which quantises on a GPU alone unless it is told that the CPU is one."""
    import auto_gptq.modeling._base as its_model
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

    its_model.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None

    def dequantised(folder: Path) -> Weights:
        found, tensors = rest(folder, PACKED), load_file(folder / "model.safetensors")
        for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
            inputs, out = tensors[f"{name}.g_idx"].shape[0], tensors[f"{name}.scales"].shape[1]
            module = QuantLinear(4, 32, inputs, out, True, weight_dtype=torch.float32)
            module.load_state_dict({it: tensors[f"{name}.{it}"] for it in ("qweight", "qzeros", "scales", "g_idx", "bias")})
            module.scales, module.bias = module.scales.float(), module.bias.float()
            found[f"{name}.weight"] = module(torch.eye(inputs)).T.contiguous()
        return found

    for name, options in AUTOGPTQ.items():
        there, torch.cuda.is_available = torch.cuda.is_available, lambda: True
        model = AutoGPTQForCausalLM.from_pretrained(str(base()), BaseQuantizeConfig(bits=4, **options), torch_dtype=torch.float16)
        torch.cuda.is_available = there
        model.quantize(examples(), use_triton=False)
        written = Path(tempfile.mkdtemp())
        model.save_quantized(str(written), use_safetensors=True)
        keep(name, written, dequantised)


def llmcompressor() -> None:
    """llm-compressor: GPTQ and AWQ results in the layout of compressed-tensors."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.quantization import GPTQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache._pin_intermediate = classmethod(lambda *_: None)  # memory is pinned for a GPU

    def groups(**more: str) -> dict[str, object]:
        weights = dict(num_bits=4, type="int", strategy="group", group_size=32, symmetric=False, **more)
        return {"group_0": {"targets": ["Linear"], "weights": weights}}

    schemes = {
        "compressor_gptq": GPTQModifier(config_groups=groups(actorder="static"), ignore=["lm_head"]),
        "compressor_awq": AWQModifier(config_groups=groups(), ignore=["lm_head"]),
    }
    for name, modifier in schemes.items():
        model, written = AutoModelForCausalLM.from_pretrained(base(), dtype="auto"), Path(tempfile.mkdtemp())
        oneshot(model=model, recipe=modifier, dataset=Dataset.from_list(examples()), max_seq_length=48, num_calibration_samples=16)
        model.save_pretrained(written, save_compressed=True)
        keep(name, written, read_by_transformers)


def read_by_transformers(folder: Path) -> Weights:
    """The weights as transformers unpacks them (for llm-compressor by compressed-tensors); its arithmetic is that of the scales, which
    are given to it in float32."""
    from transformers import CompressedTensorsConfig, FineGrainedFP8Config

    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    how = CompressedTensorsConfig(run_compressed=False) if method == "compressed-tensors" else FineGrainedFP8Config(dequantize=True)
    tensors, copy = load_file(folder / "model.safetensors"), Path(tempfile.mkdtemp())
    save_file(
        {key: value.float() if key.endswith("weight_scale") else value for key, value in tensors.items()},
        copy / "model.safetensors",
        {"format": "pt"},
    )
    shutil.copy(folder / "config.json", copy)
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32, quantization_config=how)
    return {key: value for key, value in model.state_dict().items() if key.endswith("weight")}


def transformers() -> None:
    """transformers: fp8 in tiles and as a whole. It wants a GPU for it, though the arithmetic runs on a CPU."""
    from transformers import FineGrainedFP8Config
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    for name, options in FP8.items():
        there, FineGrainedFP8HfQuantizer.validate_environment = FineGrainedFP8HfQuantizer.validate_environment, lambda *_, **__: None
        model = AutoModelForCausalLM.from_pretrained(base(), dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(**options))
        written = Path(tempfile.mkdtemp())
        model.save_pretrained(written)
        FineGrainedFP8HfQuantizer.validate_environment = there
        keep(name, written, read_by_transformers)


MAKERS = {maker.__name__: maker for maker in (gptqmodel, autoawq, autogptq, llmcompressor, transformers)}

if __name__ == "__main__":
    for library in sys.argv[1:]:
        MAKERS[library]()
