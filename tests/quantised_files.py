"""Quantised matrices written as each checkpoint format defines them, word by word, and what they mean, in NumPy alone."""

import json
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tests.weight_files import write

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass
class Matrix:
    """q, zeros and scales of a matrix [out, in]; q and zeros unsigned, `group` inputs to a scale."""

    q: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    group: int

    @classmethod
    def random(cls, draw, out, inputs, group, *, bits=4, symmetric=False, scale_dtype=np.float16, lowest_zero=1):
        """Numbers that use every value."""
        top, groups = 1 << bits, inputs // group
        zeros = np.full((out, groups), top // 2) if symmetric else draw.integers(lowest_zero, top, (out, groups))
        scales = draw.uniform(1e-3, 1e-2, (out, groups)).astype(scale_dtype)
        return cls(draw.integers(0, top, (out, inputs)), zeros, scales, group)

    @property
    def exact(self):
        """(q - zero) * scale in float32."""
        wide = [np.repeat(it, self.group, axis=1) for it in (self.zeros, self.scales.astype(np.float32))]
        return ((self.q - wide[0]).astype(np.float32) * wide[1]).astype(np.float32)


def pack(numbers, bits, axis):
    """Unsigned numbers into int32 words along an axis, low bits first; what is missing of the last word is 0."""
    each = 32 // bits
    moved = np.moveaxis(numbers, axis, -1).astype(np.uint64)
    padded = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, -moved.shape[-1] % each)])
    words = np.zeros((*padded.shape[:-1], padded.shape[-1] // each), np.uint64)
    for place in range(each):
        words |= padded[..., place::each] << np.uint64(bits * place)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis).astype(np.uint32).view(np.int32))


def awq(name, matrix):
    """qweight [in, out / 8] and qzeros [groups, out / 8], eight outputs to a word in AWQ's order."""

    def shuffled(numbers):
        eights = numbers.T.reshape(numbers.shape[1], -1, 8)
        return pack(eights[:, :, list(AWQ_ORDER)].reshape(numbers.shape[1], -1), 4, 1)

    return {
        f"{name}.qweight": shuffled(matrix.q),
        f"{name}.qzeros": shuffled(matrix.zeros),
        f"{name}.scales": np.ascontiguousarray(matrix.scales.T),
    }


def gptq(name, matrix, *, version=1, order=None):
    """qweight [in / 8, out], qzeros [groups, out / 8], less 1 in version 1; order: the group that each run of columns is given."""
    groups = matrix.scales.shape[1]
    order = list(range(groups)) if order is None else order
    by_group = np.argsort(order)  # run r has group order[r], whose scales stand in row order[r]
    return {
        f"{name}.qweight": pack(matrix.q.T, 4, 0),
        f"{name}.qzeros": pack(matrix.zeros.T[by_group] - (version == 1), 4, 1),
        f"{name}.scales": np.ascontiguousarray(matrix.scales.T[by_group]),
        f"{name}.g_idx": np.repeat(np.array(order, np.int32), matrix.group),
    }


def packed(name, matrix, *, bits=4, zeros=True):
    """compressed-tensors "pack-quantized"."""
    found = {
        f"{name}.weight_packed": pack(matrix.q, bits, 1),
        f"{name}.weight_scale": matrix.scales,
        f"{name}.weight_shape": np.array(matrix.q.shape, np.int64),
    }
    return found | ({f"{name}.weight_zero_point": pack(matrix.zeros, bits, 0)} if zeros else {})


def weights_config(**weights):
    """A quantization_config of compressed-tensors with one group for all linear modules; `activations`, `format` and `top` aside."""
    inputs, form, top = weights.pop("activations", None), weights.pop("format"), weights.pop("top", {})
    usual = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False}
    group = {"targets": ["Linear"], "weights": usual | weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "global_compression_ratio": None, **top,
    }  # fmt: skip


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True, "observer": None}


def opened(folder, tensors):
    """Tensors written to a file of this folder and opened by the loader's reader."""
    from jaxinfer.checkpoint.formats.safetensors import SafetensorsFile

    return SafetensorsFile(write(folder / "model.safetensors", tensors)).tensors()


def meant(stored, shape, group):
    """The matrix that a `Stored` means, read in two pieces each way, in float32."""
    rows, columns = (slice(0, shape[0] // 3), slice(shape[0] // 3, shape[0])), (slice(0, shape[1] // 2), slice(shape[1] // 2, shape[1]))

    def whole(view):
        wide = [slice(0, view.shape[1])] if view.shape[1] != shape[1] else columns
        return np.concatenate([np.concatenate([view.read((row, column)) for column in wide], axis=1) for row in rows])

    values, scales = whole(stored.values).astype(np.float32), np.repeat(whole(stored.scales), group, axis=1)
    zeros = 0 if stored.zeros is None else np.repeat(whole(stored.zeros), group, axis=1)
    found = ((values - zeros) * scales[:, : shape[1]]).astype(np.float32)
    return found if stored.order is None else found[:, np.argsort(stored.order)]


def options(folder, config):
    """The `Options` of a quantization_config."""
    from jaxinfer.checkpoint.formats.quantised import Options

    return Options(json.loads(json.dumps(config)), folder / "config.json")


def quantised_model(source, target, config, matrices):
    """A golden folder with each of its layers' matrices replaced: matrices(name, shape) gives the tensors and what they mean.

    Returns what they mean, by the name of the unquantised tensor.
    """
    from tests.weight_files import read_all

    tensors = {key: values for file in sorted(source.glob("*.safetensors")) for key, values in read_all(file).items()}
    meanings = {}
    for name in [it for it in tensors if it.endswith("_proj.weight")]:
        made, meanings[name] = matrices(name.removesuffix(".weight"), tensors.pop(name).shape)
        tensors |= made
    target.mkdir()
    write(target / "model.safetensors", tensors)
    (target / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | {"quantization_config": config}))
    plain = target.with_name(target.name + "-plain")
    plain.mkdir()
    kept = {name: values for name, values in tensors.items() if name.rpartition(".")[0] + ".weight" not in meanings}
    write(plain / "model.safetensors", kept | meanings)
    (plain / "config.json").write_text((source / "config.json").read_text())
    return plain


def tiny_model(folder):
    """The tests' tiny model with weights in bfloat16, a tokenizer and settings: a whole folder to convert and to break."""
    from jaxinfer.models import find
    from jaxinfer.models.graph import Graph
    from jaxinfer.models.weights import transform_of
    from tests.jaxinfer.conftest import CONFIG, write_folder

    folder.mkdir()
    write_folder(folder, intermediate_size=64)
    module = find.find("llama")
    graph = Graph.of(module, module.Config.from_hf(CONFIG | {"intermediate_size": 64}), np.float32)
    draw, tensors = np.random.default_rng(0), {}
    for name, spec in zip(graph.names, graph.specs, strict=True):
        transform, layer = transform_of(name, module.WEIGHTS)
        for tensor, shape in transform.needs(graph.config, spec.shape, layer).items():
            tensors[tensor] = draw.normal(1.0 if len(shape) == 1 else 0.0, 0.2, shape).astype(ml_dtypes.bfloat16)
    write(folder / "model.safetensors", tensors)
    return folder
