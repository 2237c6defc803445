"""Quantised checkpoints of every format become the weights that their definition means, bit for bit, on one device and on a mesh."""

import json

import ml_dtypes
import numpy as np
import pytest

from jaxinfer.checkpoint import read
from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats.find import format_of
from jaxinfer.checkpoint.formats.folder import WeightFiles
from jaxinfer.checkpoint.json_files import read_json
from jaxinfer.checkpoint.stored import module_of
from jaxinfer.models.weights import transform_of
from jaxinfer.quant.qarray import PACKED, QArray, QSpec, check
from jaxinfer.sharding import make_mesh, named
from tests import quantised_files as files
from tests.driving import GOLDEN, Driver, golden_graph
from tests.quantised_files import FP8, Matrix
from tests.weight_files import read_all, write

GROUP = 32
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
W4 = files.weights_config(format="pack-quantized", num_bits=4, strategy="group", group_size=GROUP)
W4_ZEROS = files.weights_config(format="pack-quantized", num_bits=4, strategy="group", group_size=GROUP, symmetric=False)


def draw_of(name):
    return np.random.default_rng(len(name) + sum(map(ord, name)))


def awq(name, shape):
    matrix = Matrix.random(draw_of(name), *shape, GROUP, lowest_zero=0)
    return files.awq(name, matrix), matrix.exact


def gptq(name, shape):
    matrix = Matrix.random(draw_of(name), *shape, GROUP, lowest_zero=1)
    matrix.zeros[0, 0] = 16
    return files.gptq(name, matrix, order=list(range(shape[1] // GROUP))[::-1]), matrix.exact


def packed(bits, group=None, zeros=False, dtype=np.float16):
    def make(name, shape):
        matrix = Matrix.random(draw_of(name), *shape, group or shape[1], bits=bits, symmetric=not zeros, scale_dtype=dtype)
        return files.packed(name, matrix, bits=bits, zeros=zeros), matrix.exact

    return make


def int8(name, shape):
    q, scale = draw_of(name).integers(-128, 128, shape).astype(np.int8), draw_of(name).uniform(1e-3, 1e-2, (shape[0], 1)).astype(np.float32)
    return {f"{name}.weight": q, f"{name}.weight_scale": scale}, q.astype(np.float32) * scale


def fp8(block=None, rows=False):
    def make(name, shape):
        values = draw_of(name).normal(0, 20, shape).astype(FP8)
        count = tuple(-(-size // block) for size in shape) if block else (shape[0], 1) if rows else (1, 1)
        scale = draw_of(name).uniform(1e-3, 1e-2, count).astype(np.float32)
        wide = np.repeat(np.repeat(scale, block or 1, 0), block or 1, 1)[: shape[0], : shape[1]] if block else scale
        named_so = f"{name}.weight_scale_inv" if block else f"{name}.weight_scale"
        return {f"{name}.weight": values, named_so: scale if block or rows else scale.reshape(())}, values.astype(np.float32) * wide

    return make


CASES = {
    "awq": (AWQ, awq, "int4"),
    "gptq": (GPTQ, gptq, "int4"),
    "w4a16": (W4, packed(4, GROUP, dtype=ml_dtypes.bfloat16), "int4"),
    "w4a16 zeros": (W4_ZEROS, packed(4, GROUP, zeros=True), "int4"),
    "w8a16": (files.weights_config(format="pack-quantized"), packed(8), "int8"),
    "w8a8": (files.weights_config(format="int-quantized", activations=files.TOKEN), int8, "w8a8"),
    "fp8 tensor": ({"quant_method": "fp8"}, fp8(), "fp8"),
    "fp8 rows": (files.weights_config(format="float-quantized", type="float"), fp8(rows=True), "fp8"),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}, fp8(GROUP), "fp8"),
    "fp8 large blocks": ({"quant_method": "fp8", "weight_block_size": [80, 80]}, fp8(80), "fp8"),
}


def folders(case, tmp_path):
    config, make, _ = CASES[case]
    plain = files.quantised_model(GOLDEN / "linear", tmp_path / "model", config, make)
    return tmp_path / "model", plain


def spread(array, weight):
    """Scales or zeros of a QArray over all of the weight, in NumPy."""
    found = np.asarray(array).astype(np.float32)
    for axis, block in enumerate(weight.blocks):
        found = np.repeat(found, block, axis=axis)
    return found


def meaning(weight):
    """What a QArray means, in NumPy."""
    values = np.asarray(weight.values)
    if values.dtype != PACKED:
        return values.astype(np.float32) * spread(weight.scales, weight)
    values = np.stack([values & 15, values >> 4], axis=-1).reshape(weight.shape).astype(np.float32)
    return (values - (8 if weight.zeros is None else spread(weight.zeros, weight))) * spread(weight.scales, weight)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_the_format_means(case, tmp_path):
    folder, plain = folders(case, tmp_path)
    graph = read.as_stored(folder, golden_graph("linear"))
    read.verify(folder, graph)
    exact = read.load(plain, golden_graph("linear"), make_mesh({}))
    for mesh in (make_mesh({"tensor": 4}), *([make_mesh({})] if case == "awq" else [])):
        weights = read.load(folder, graph, mesh)
        for name, spec in zip(graph.names, graph.specs, strict=True):
            weight = weights[name]
            assert isinstance(weight, QArray) == isinstance(spec, QSpec) == (name.startswith("layers") and "norm" not in name)
            if isinstance(weight, QArray) and isinstance(spec, QSpec):
                check(weight)
                assert spec.scheme == CASES[case][2] and weight.activations == ("int8" if case == "w8a8" else "float")
                assert all(leaf.sharding == named(array, mesh) for leaf, array in zip(graph.leaves(weights), graph.arrays, strict=True))
                weight = meaning(weight)
            assert np.array_equal(weight, exact[name]), name


@pytest.mark.ci
@pytest.mark.parametrize("case", [case for case in CASES if case != "w8a8"])
def test_products_are_those_of_the_meaning(case, tmp_path):
    folder, plain = folders(case, tmp_path)
    for mesh in (make_mesh({}), make_mesh({"tensor": 4})):
        found = []
        for path, graph in ((folder, read.as_stored(folder, golden_graph("linear"))), (plain, golden_graph("linear"))):
            driver = Driver(graph, graph.leaves(read.load(path, graph, mesh)), mesh)
            found.append(driver.logits([[5, 9, 100, 31, 77, 8]], [[6]])[0])
        assert np.abs(found[0] - found[1]).max() < 2e-5 * np.abs(found[1]).max()


LIBRARY = ["fp8_blocks", "w4a16_zeros", *(pytest.param(name, marks=pytest.mark.ci) for name in ("fp8", "w4a16", "w8a16", "w8a8"))]


@pytest.mark.parametrize("scheme", LIBRARY)
def test_what_the_compressed_tensors_library_writes_is_what_it_reads(scheme):
    """`w8a8` rounds activations here, which the expected logits do not."""
    folder = GOLDEN / "quantised" / scheme
    graph, expected = read.as_stored(folder, golden_graph("grouped")), np.load(folder / "expected.npz")
    driver = Driver(graph, graph.leaves(read.load(folder, graph, make_mesh({}))))
    ends = np.cumsum(expected["lengths"])
    longest = slice(ends[1], ends[2])
    found = driver.logits([expected["tokens"][longest].tolist()], [[int(expected["lengths"][2])]])[0]
    wanted = expected["logits"][longest]
    assert np.abs(found - wanted).max() < (0.05 if scheme == "w8a8" else 5e-6) * np.abs(wanted).max()


FOREIGN = sorted(folder.name for folder in (GOLDEN / "foreign").iterdir())


@pytest.mark.parametrize("name", FOREIGN)
def test_matrices_are_those_that_the_library_unpacks_from_its_own_files(name):
    """Each matrix times a vector, which the expected file has by the matrix's name."""
    folder, shapes = GOLDEN / "foreign" / name, {}
    graph, form = golden_graph(f"foreign/{name}"), format_of(read_json(folder / "config.json"), folder / "config.json")
    assert form is not None
    for weight, spec, contracting in zip(graph.names, graph.specs, graph.contracting, strict=True):
        transform, layer = transform_of(weight, graph.module.WEIGHTS)
        needs = transform.needs(graph.config, spec.shape, layer) if contracting else {}
        shapes |= {tensor: shape for tensor, shape in needs.items() if form.encoding(module_of(tensor))}
    with np.load(folder / "expected.npz") as expected, WeightFiles(folder) as weights:
        assert set(expected.files) == {"tokens", "logits", *shapes}
        for tensor, shape in shapes.items():
            module = module_of(tensor)
            found = files.meant(form.stored(module, shape, weights.tensors), shape, form.encoding(module).group or shape[1])
            product = found.astype(np.float64) @ np.cos(np.arange(1, shape[1] + 1, dtype=np.float64) ** 2)
            assert np.abs(product - expected[tensor]).max() < 2e-7 * np.abs(expected[tensor]).max(), tensor


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.ci)])
@pytest.mark.parametrize("name", ["gptq_order", *(pytest.param(it, marks=pytest.mark.ci) for it in FOREIGN if it != "gptq_order")])
def test_logits_are_those_of_the_library(name, tensor):
    folder, mesh = GOLDEN / "foreign" / name, make_mesh({"tensor": tensor})
    graph, expected = read.as_stored(folder, golden_graph(f"foreign/{name}")), np.load(folder / "expected.npz")
    assert any(isinstance(spec, QSpec) and spec.order is not None for spec in graph.specs) == name.endswith("_order")
    driver = Driver(graph, graph.leaves(read.load(folder, graph, mesh)), mesh)
    found = driver.logits([expected["tokens"].tolist()], [[len(expected["tokens"])]])[0]
    assert np.abs(found - expected["logits"]).max() < 5e-6 * np.abs(expected["logits"]).max()


def broken_by(case, change, tmp_path):
    folder, _ = folders(case, tmp_path)
    tensors = read_all(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


UP, KEY = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj"
BROKEN = {
    "missing scale": ("w8a8", lambda t, c: t.pop(f"{UP}.weight_scale"), f"tensor '{UP}.weight_scale': expected shape [96, 1] or [96]"),
    "missing words": ("awq", lambda t, c: t.pop(f"{KEY}.qzeros"), f"tensor '{KEY}.qzeros': expected shape [2, 4] as config.json asks for"),
    "no scheme": ("w8a8", lambda t, c: c.clear(), "proj.weight': expected a floating dtype, found int8; config.json has no"),
    "no word": ("gptq", lambda t, c: c.clear(), "found no such tensor; config.json has no quantization_config that says how to read"),
    "another group": ("awq", lambda t, c: c.update(group_size=16), "qzeros': expected shape [4, 8] as config.json asks for, found [2, 8]"),
    "group of no size": ("gptq", lambda t, c: c.update(group_size=48), "expected sizes in whole words of 8, inputs in groups of 48"),
    "misshapen": ("fp8 blocks", lambda t, c: t.update({f"{UP}.weight_scale_inv": np.ones((3, 1), np.float32)}), "expected shape [3, 2]"),
    "dtype": ("gptq", lambda t, c: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].astype(np.int64)}), "expected dtype int32, found int64"),
    "floats": ("w8a8", lambda t, c: t.update({f"{UP}.weight": np.ones((96, 64), np.float32)}), "expected dtype int8, found float32"),
    "wide scales": (
        "w8a8", lambda t, c: t.update({f"{UP}.weight_scale": np.ones((96, 1))}),
        "expected dtype float16 or bfloat16 or float32, found float64",
    ),
    "extra": ("awq", lambda t, c: t.update({f"{UP}.qbias": np.ones(3, np.int32)}), f"tensor '{UP}.qbias': expected only tensors that"),
    "kept": ("w8a8", lambda t, c: c["ignore"].append(KEY), "found w8a8 and unquantised"),
    "scale 0": ("w8a16", lambda t, c: t[f"{UP}.weight_scale"].fill(0), f"tensor '{UP}.weight_scale': expected scales that are finite"),
    "scale NaN": ("fp8 tensor", lambda t, c: t[f"{UP}.weight_scale"].fill(np.nan), "finite and above 0, found nan"),
    "scale negative": ("gptq", lambda t, c: np.negative(t[f"{UP}.scales"], out=t[f"{UP}.scales"]), "finite and above 0, found -0.0"),
    "NaN": ("fp8 rows", lambda t, c: t[f"{UP}.weight"].view(np.uint8).fill(127), f"tensor '{UP}.weight': expected numbers that are finite"),
    "bias": ("gptq", lambda t, c: t.update({f"{UP}.bias": np.eye(96, dtype=np.float16)[0]}), "up_proj.bias': expected only tensors"),
    "order": ("gptq", lambda t, c: t.update({f"{KEY}.g_idx": np.roll(t[f"{KEY}.g_idx"], 1)}), "in one order, as they are one matrix here"),
    "method": ("awq", lambda t, c: c.update(quant_method="hqq"), "quant_method = 'awq' or"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_damaged_is_one_clear_error(case, tmp_path):
    kind, change, words = BROKEN[case]
    folder = broken_by(kind, change, tmp_path)
    with pytest.raises(CheckpointError) as error:
        read.load(folder, read.as_stored(folder, golden_graph("linear")), make_mesh({}))
    assert words in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)
