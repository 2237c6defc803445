"""Write and read a Llama checkpoint in Hugging Face's layout: bf16 safetensors in small files, an index, config.json.

Life of the data: a dict of arrays under Hugging Face names -> files of at most `FILE_BYTES` each -> the same dict, bit for bit. The
safetensors format is eight bytes of header length, a JSON header, the raw bytes. What this file does NOT know: how the arrays came about.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

FILE_BYTES = 7_900_000
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Shape:
    """The sizes of one Llama model; units are elements. Raises ValueError when heads or dimensions do not fit."""

    vocab_size: int = 8192
    hidden_size: int = 384
    intermediate_size: int = 896
    num_hidden_layers: int = 8
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"{self.num_attention_heads} query heads are not a multiple of {self.num_key_value_heads} key heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rope rotates pairs")


DEMO = Shape()
DRAFT = Shape(hidden_size=192, intermediate_size=512, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1)


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint under its Hugging Face name with its shape (projections are [out, in])."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    per_layer = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": size for name, size in per_layer.items()}
    return shapes | {"model.norm.weight": (hidden,)}


def parameter_count(shape: Shape) -> int:
    """How many numbers the checkpoint holds."""
    return sum(int(np.prod(size)) for size in tensor_shapes(shape).values())


def hf_config(shape: Shape) -> dict[str, Any]:
    """The fields of config.json, readable by transformers 4 and 5 (`rope_theta` and `rope_parameters`, `torch_dtype` and `dtype`)."""
    return asdict(shape) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "bos_token_id": 0,
        "eos_token_id": [2, 0],
        "pad_token_id": 3,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one safetensors file of bf16 arrays; the header is padded with spaces to a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        if array.dtype != BFLOAT16:
            raise TypeError(f"{name}: expected bfloat16, found {array.dtype}")
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read one safetensors file of bf16 arrays; raises ValueError for another dtype or bytes that do not add up."""
    blob = path.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        if entry["dtype"] != "BF16" or stop > len(blob):
            raise ValueError(f"{path.name}: {name}: expected BF16 ending by byte {len(blob)}, found {entry['dtype']} ending at {stop}")
        tensors[name] = np.frombuffer(blob[start:stop], BFLOAT16).reshape(entry["shape"])
    return tensors


def _shards(tensors: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Group tensors, in order, into files of at most FILE_BYTES (a single larger tensor gets a file of its own)."""
    groups: list[dict[str, np.ndarray]] = [{}]
    for name, array in tensors.items():
        used = sum(other.nbytes for other in groups[-1].values())
        if groups[-1] and used + array.nbytes > FILE_BYTES:
            groups.append({})
        groups[-1][name] = array
    return groups


def write_checkpoint(folder: Path, shape: Shape, tensors: Mapping[str, np.ndarray]) -> None:
    """Write config.json, the shards and their index into `folder`; raises ValueError when names or shapes are not the model's."""
    expected = tensor_shapes(shape)
    found = {name: tuple(array.shape) for name, array in tensors.items()}
    if found != expected:
        wrong = {name: (expected.get(name), found.get(name)) for name in expected | found if expected.get(name) != found.get(name)}
        raise ValueError(f"tensors do not fit the model (name: (expected, found)): {wrong}")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors"):
        old.unlink()
    groups = _shards({name: np.asarray(tensors[name]).astype(BFLOAT16) for name in expected})
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        write_safetensors(folder / name, group)
    total = sum(array.nbytes for group in groups for array in group.values())
    weight_map = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(hf_config(shape), indent=2) + "\n", encoding="utf-8")


def read_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """Read every tensor that the index names; raises KeyError when a shard lacks one."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    shards = {name: read_safetensors(folder / name) for name in sorted(set(weight_map.values()))}
    return {tensor: shards[name][tensor] for tensor, name in weight_map.items()}
