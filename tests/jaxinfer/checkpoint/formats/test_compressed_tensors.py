"""compressed-tensors: int8, int4 and fp8 in each layout, bit-exact against the format's definition, and what is refused by name."""

import ml_dtypes
import numpy as np
import pytest

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats import compressed_tensors
from jaxinfer.checkpoint.formats.quantised import Encoding
from tests.quantised_files import FP8, TOKEN, Matrix, meant, opened, options, packed, weights_config

SHAPE = (20, 48)


def form_of(folder, **weights):
    return compressed_tensors.read(options(folder, weights_config(**weights)))


def decoded(folder, form, tensors, group):
    opened_tensors = opened(folder, tensors)
    for name, need in form.needs("q", SHAPE).items():
        assert opened_tensors[name].shape in need.shapes and opened_tensors[name].dtype.name in need.dtypes
    return meant(form.stored("q", SHAPE, opened_tensors), SHAPE, group)


@pytest.mark.parametrize("activations", [None, TOKEN])
def test_int8_plain(activations, tmp_path):
    draw = np.random.default_rng(0)
    q, scale = draw.integers(-128, 128, SHAPE).astype(np.int8), draw.uniform(1e-3, 1e-2, (20, 1)).astype(ml_dtypes.bfloat16)
    form = form_of(tmp_path, format="int-quantized", activations=activations)
    assert form.encoding("x") == Encoding("w8a8" if activations else "int8")
    exact = q.astype(np.float32) * scale.astype(np.float32)
    assert np.array_equal(decoded(tmp_path, form, {"q.weight": q, "q.weight_scale": scale}, 48), exact)


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [True, False])
def test_packed(group, bits, zeros, tmp_path):
    if bits == 8 and zeros:
        return
    matrix = Matrix.random(np.random.default_rng(bits), *SHAPE, group or 48, bits=bits, symmetric=not zeros, lowest_zero=0)
    strategy = "group" if group else "channel"
    form = form_of(tmp_path, format="pack-quantized", num_bits=bits, symmetric=not zeros, strategy=strategy, group_size=group)
    assert form.encoding("x") == Encoding("int4" if bits == 4 else "int8", group, zeros)
    assert np.array_equal(decoded(tmp_path, form, packed("q", matrix, bits=bits, zeros=zeros), group or 48), matrix.exact)
    if zeros:
        plain = packed("q", matrix) | {"q.weight_zero_point": (matrix.zeros - 8).astype(np.int8)}
        assert np.array_equal(decoded(tmp_path, form, plain, group or 48), matrix.exact)


def test_columns_by_the_groups_that_they_are_in(tmp_path):
    matrix = Matrix.random(np.random.default_rng(5), *SHAPE, 16)
    order = [1, 2, 0]
    stored = packed("q", Matrix(matrix.q, matrix.zeros[:, np.argsort(order)], matrix.scales[:, np.argsort(order)], 16))
    stored["q.weight_g_idx"] = np.repeat(np.array(order, np.int32), 16)
    weights = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 16}
    form = form_of(tmp_path, format="pack-quantized", actorder="group", **weights)
    assert np.array_equal(decoded(tmp_path, form, stored, 16), matrix.exact)
    stored["q.weight_g_idx"] = np.arange(48, dtype=np.int32) % 3
    wide = [it.astype(np.float32)[:, np.arange(48) % 3] for it in (matrix.zeros[:, np.argsort(order)], matrix.scales[:, np.argsort(order)])]
    assert np.array_equal(decoded(tmp_path, form, stored, 16), (matrix.q - wide[0]) * wide[1])
    assert "q.weight_g_idx" not in form_of(tmp_path, format="pack-quantized", actorder="weight", **weights).needs("q", SHAPE)


@pytest.mark.parametrize(("strategy", "shape"), [("tensor", (1,)), ("channel", (20, 1)), ("block", (3, 3))])
def test_fp8(strategy, shape, tmp_path):
    draw = np.random.default_rng(1)
    values, scale = draw.normal(0, 20, SHAPE).astype(FP8), draw.uniform(1e-3, 1e-2, shape).astype(np.float32)
    block = {"block_structure": "8x16"} if strategy == "block" else {}
    form = form_of(tmp_path, format="float-quantized", type="float", strategy=strategy, activations=TOKEN | {"type": "float"}, **block)
    assert form.encoding("x") == Encoding("fp8", 16 if block else None)
    wide = np.repeat(np.repeat(scale, 8, 0)[:20], 16, 1) if block else scale.reshape(-1, 1)
    found = decoded(tmp_path, form, {"q.weight": values, "q.weight_scale": scale}, 16 if block else 48)
    assert np.array_equal(found, values.astype(np.float32) * wide)


def test_which_modules_belong_to_which_group(tmp_path):
    config = weights_config(format="int-quantized", top={"ignore": ["lm_head", "re:.*self_attn.*"]})
    first = config["config_groups"]["group_0"]
    packed_group = {"format": "pack-quantized", "weights": first["weights"] | {"num_bits": 4, "strategy": "group", "group_size": 32}}
    config["config_groups"]["group_1"] = first | packed_group | {"targets": ["re:.*down_proj$"]}
    form = compressed_tensors.read(options(tmp_path, config))
    assert form.encoding("lm_head") is None and form.encoding("model.layers.0.self_attn.q_proj") is None
    assert form.encoding("model.layers.0.mlp.up_proj") == Encoding("int8")
    assert form.encoding("model.layers.0.mlp.down_proj") == Encoding("int4", 32)
    config["ignore"] = ["re:*"]
    with pytest.raises(CheckpointError, match="not an expression"):
        compressed_tensors.read(options(tmp_path, config)).encoding("x")


def test_a_shape_that_says_something_else(tmp_path):
    matrix = Matrix.random(np.random.default_rng(0), *SHAPE, 16, symmetric=True)
    tensors = packed("q", matrix, zeros=False) | {"q.weight_shape": np.array([20, 47])}
    form = form_of(tmp_path, format="pack-quantized", num_bits=4, strategy="group", group_size=16)
    with pytest.raises(CheckpointError, match=r"'q.weight_shape': expected the shape \[20, 48\] .* found \[20, 47\]"):
        form.stored("q", SHAPE, opened(tmp_path, tensors))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"num_bits": 2}, "weights.num_bits = 8 or 4, found 2"),
        ({"symmetric": False}, "weights.symmetric = True, found False; use a symmetric checkpoint"),
        ({"dynamic": True}, "weights.dynamic = False, found True"),
        ({"num_bits": 4}, "weights that are int4 or int8 packed, or int8 or fp8 plain, found int of 4 bits as int-quantized"),
        ({"format": "marlin-24"}, "format 'pack-quantized' or 'int-quantized' for weights of type 'int', found marlin-24"),
        ({"type": "float"}, "format 'pack-quantized' or 'float-quantized' for weights of type 'float', found int-quantized"),
        ({"strategy": "group"}, "weights.group_size = a whole number above 0"),
        ({"strategy": "block", "block_structure": "128"}, "block_structure = [rows, columns]"),
        ({"strategy": "attn_head"}, "strategy = 'tensor' or 'channel'"),
        ({"activations": TOKEN | {"dynamic": False}}, "input_activations.dynamic = True, found False; use a checkpoint whose activations"),
        ({"top": {"kv_cache_scheme": {"num_bits": 8}}}, "kv_cache_scheme = None"),
        ({"top": {"transform_config": {"x": 1}}}, "transform_config"),
        ({"top": {"sparsity_config": {"format": "sparse-24-bitmask"}}}, "sparsity_config.format = 'dense', found sparse-24-bitmask"),
        ({"top": {"config_groups": {}}}, "config_groups, an object of groups"),
        ({"top": {"other": 1}}, "found other = 1"),
        ({"zp": 1}, "found zp = 1"),
    ],
)  # fmt: skip
def test_other_options_are_refused_by_name(weights, words, tmp_path):
    with pytest.raises(CheckpointError) as error:
        form_of(tmp_path, **{"format": "int-quantized"} | weights)
    assert words in str(error.value) and "config.json" in str(error.value)
