"""Makes the golden files: tiny random models in Hugging Face's layout, and what Hugging Face computes with them.

    PYTHON tests/golden/make.py                          all models below, each a folder beside this file
    PYTHON tests/golden/make.py --only NAME              one of them
    PYTHON tests/golden/make.py --expected FOLDER FILE   what Hugging Face computes with an existing model, for example checkpoints/demo

PYTHON belongs to an environment of its own with torch and transformers; the tests need neither. A golden folder holds config.json,
the weights, and expected.npz: ragged prompts (tokens, lengths), float32 logits of every position and the residual stream after the
embedding and after each layer. Weights are larger than a trained model's, so that every part of the arithmetic shows in the logits.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LENGTHS = (5, 1, 17, 9)
SMALL = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=256)
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
LINEAR = {"rope_type": "linear", "factor": 3.0}
TINY = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)

# name -> config, dtype of the file, bytes per shard, fields of config.json to write over what transformers writes
MODELS = {
    "grouped": (dict(num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=3), torch.bfloat16, "60KB", {}),
    "biased": (dict(num_attention_heads=4, num_key_value_heads=4, attention_bias=True, mlp_bias=True), torch.float16, "1GB", {}),
    "llama3": (
        dict(
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=24,
            tie_word_embeddings=True,
            rope_parameters={**LLAMA3, "rope_theta": 500.0},
        ),
        torch.bfloat16,
        "1GB",
        {},
    ),
    "linear": (
        dict(num_attention_heads=8, num_key_value_heads=4, rms_norm_eps=1e-5, rope_parameters={**LINEAR, "rope_theta": 3000.0}),
        torch.float32,
        "1GB",
        {"rope_parameters": None, "rope_theta": 3000.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
    ),
    "qwen3": (
        dict(**TINY, head_dim=16, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1000.0}),
        torch.bfloat16,
        "1GB",
        {},
    ),
    "mixtral": (
        dict(**TINY, num_local_experts=4, num_experts_per_tok=2, rope_parameters={"rope_type": "default", "rope_theta": 1000.0}),
        torch.bfloat16,
        "1GB",
        {},
    ),
    "gemma3": (
        dict(
            **TINY,
            head_dim=16,
            num_hidden_layers=3,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=24,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {**LINEAR, "rope_theta": 1000.0},
            },
        ),
        torch.bfloat16,
        "1GB",
        {},
    ),
}
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}


def randomise(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Matrices with deviation 1.2 / sqrt(inputs), norms around what leaves as it is, biases of 0.2, all rounded to the file's dtype."""
    neutral = 0 if isinstance(model, Gemma3ForCausalLM) else 1
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        if name.endswith("bias"):
            value = 0.2 * noise
        elif parameter.ndim == 1:
            value = neutral + 0.2 * noise
        else:
            value = 1.2 * noise / parameter.shape[-1] ** 0.5
        parameter.data = value.to(dtype).float()


def expected(model: torch.nn.Module, vocab: int) -> dict[str, np.ndarray]:
    """Run each prompt alone, without padding, in float32."""
    generator = np.random.default_rng(7)
    tokens, logits, streams = [], [], []
    for length in LENGTHS:
        prompt = generator.integers(0, vocab, length)
        captured: list[torch.Tensor] = []
        layers = [model.model.embed_tokens, *model.model.layers]
        keep = lambda _, __, out, captured=captured: captured.append(out[0] if isinstance(out, tuple) else out)
        hooks = [layer.register_forward_hook(keep) for layer in layers]
        with torch.no_grad():
            out = model(torch.tensor(prompt[None]), use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        tokens.append(prompt)
        logits.append(out.float().numpy())
        streams.append(np.stack([stream[0].float().numpy() for stream in captured]))
    return {
        "tokens": np.concatenate(tokens).astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "logits": np.concatenate(logits),
        "streams": np.concatenate(streams, axis=1),
    }


def make(name: str, folder: Path) -> None:
    """Write one golden folder."""
    fields, dtype, shard, overwritten = MODELS[name]
    torch.manual_seed(sum(name.encode()))
    of_config, of_model = FAMILIES.get(name, (LlamaConfig, LlamaForCausalLM))
    model = of_model(of_config(**{**SMALL, **fields})).float().eval()
    randomise(model, dtype)
    np.savez_compressed(folder / "expected.npz", **expected(model, SMALL["vocab_size"]))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **overwritten}.items() if key not in overwritten or value is not None}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--expected", nargs=2, metavar=("FOLDER", "FILE"))
    parser.add_argument("--only", choices=MODELS)
    arguments = parser.parse_args()
    if arguments.expected:
        model = AutoModelForCausalLM.from_pretrained(arguments.expected[0], dtype=torch.float32).eval()
        np.savez_compressed(arguments.expected[1], **expected(model, model.config.vocab_size))
        return
    for name in [arguments.only] if arguments.only else MODELS:
        folder = Path(__file__).parent / name
        folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        make(name, folder)


if __name__ == "__main__":
    main()
