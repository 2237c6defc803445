"""fp8 checkpoints: every kind of scale, bit-exact; NaN among the values is found."""

import ml_dtypes
import numpy as np
import pytest

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats import fp8
from jaxinfer.checkpoint.formats.quantised import Encoding
from tests.quantised_files import FP8, meant, opened, options

CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
SHAPE = (40, 48)


def values(seed=0):
    bits = np.random.default_rng(seed).integers(0, 256, SHAPE).astype(np.uint8)
    return np.where((bits & 127) == 127, 0, bits).astype(np.uint8).view(FP8)  # 127 and 255 are NaN


@pytest.mark.parametrize("shape", [(40, 1), (40,), (1,), (), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_scales_of_outputs_and_of_the_tensor(shape, dtype, tmp_path):
    scale = np.random.default_rng(1).uniform(1e-3, 1e-2, shape).astype(dtype) * np.ones(shape, dtype)
    tensors = opened(tmp_path, {"q.weight": values(), "q.weight_scale": np.asarray(scale, dtype), "q.input_scale": np.ones(1, np.float32)})
    form = fp8.read(options(tmp_path, CONFIG | {"activation_scheme": "static"}))
    assert all(tensors[name].shape in need.shapes for name, need in form.needs("q", SHAPE).items())
    exact = values().astype(np.float32) * np.asarray(scale, np.float32).reshape(-1, 1)
    assert np.array_equal(meant(form.stored("q", SHAPE, tensors), SHAPE, 48), exact)


def test_one_scale_under_the_name_that_transformers_gives_it(tmp_path):
    form = fp8.read(options(tmp_path, CONFIG | {"scale_fmt": "float", "expert_dtype": "fp8", "modules_to_convert": None}))
    tensors = opened(tmp_path, {"q.weight": values(), "q.weight_scale_inv": np.full((1, 1), 0.25, np.float32)})
    assert form.needs("q", SHAPE)["q.weight_scale"].other == "q.weight_scale_inv"
    assert np.array_equal(meant(form.stored("q", SHAPE, tensors), SHAPE, 48), values().astype(np.float32) / 4)


def test_scales_that_are_powers_of_two(tmp_path):
    form = fp8.read(options(tmp_path, CONFIG | {"scale_fmt": "ue8m0", "weight_block_size": [20, 24]}))
    scale = np.asarray([[0.25, 2.0], [1.0, 2.0**-9]], ml_dtypes.float8_e8m0fnu)
    tensors = opened(tmp_path, {"q.weight": values(), "q.weight_scale_inv": scale})
    need = form.needs("q", SHAPE)["q.weight_scale_inv"]
    assert tensors["q.weight_scale_inv"].dtype.name in need.dtypes
    wide = np.repeat(np.repeat(scale.astype(np.float32), 20, 0), 24, 1)
    assert np.array_equal(meant(form.stored("q", SHAPE, tensors), SHAPE, 24), values().astype(np.float32) * wide)


@pytest.mark.parametrize("block", [(16, 16), (32, 48), (128, 128)], ids=str)
def test_scales_of_blocks(block, tmp_path):
    count = tuple(-(-size // step) for size, step in zip(SHAPE, block, strict=True))
    scale = np.random.default_rng(2).uniform(1e-3, 1e-2, count).astype(np.float32)
    form = fp8.read(options(tmp_path, CONFIG | {"weight_block_size": list(block), "modules_to_not_convert": ["model.head"]}))
    assert form.encoding("a.q") == Encoding("fp8", block[1]) and form.encoding("lm_head") is None and form.encoding("model.head") is None
    tensors = opened(tmp_path, {"q.weight": values(), "q.weight_scale_inv": scale})
    assert form.needs("q", SHAPE)["q.weight_scale_inv"].shapes == (count,)
    wide = np.repeat(np.repeat(scale, block[0], 0)[: SHAPE[0]], block[1], 1)[:, : SHAPE[1]]
    stored = form.stored("q", SHAPE, tensors)
    assert np.array_equal(meant(stored, SHAPE, min(block[1], SHAPE[1])), values().astype(np.float32) * wide)


def test_bad_numbers_are_found(tmp_path):
    broken = values()
    broken.view(np.uint8)[7, 7] = 0x7F
    form = fp8.read(options(tmp_path, CONFIG))
    stored = form.stored("q", SHAPE, opened(tmp_path, {"q.weight": broken, "q.weight_scale": np.ones(1, np.float32)}))
    with pytest.raises(CheckpointError, match=r"tensor 'q.weight': expected numbers that are finite, found nan"):
        meant(stored, SHAPE, 48)
    for wrong in (0.0, -1.0, np.nan, np.inf):
        stored = form.stored("q", SHAPE, opened(tmp_path, {"q.weight": values(), "q.weight_scale": np.full(1, wrong, np.float32)}))
        with pytest.raises(CheckpointError, match=rf"tensor 'q.weight_scale': expected scales .* above 0, found {wrong:g}"):
            meant(stored, SHAPE, 48)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale_fmt": "e5m3"}, "scale_fmt = None or 'float' or 'ue8m0', found e5m3"),
        ({"expert_dtype": "fp4"}, "expert_dtype = None or 'fp8', found fp4"),
        ({"modules_to_convert": ["embed"]}, "modules_to_convert = None or []"),
        ({"fmt": "e5m2"}, "fmt = 'e4m3' or 'float8_e4m3fn', found e5m2"),
        ({"weight_block_size": [128]}, "weight_block_size = [rows, columns], found [128]"),
        ({"weight_block_size": [128, 0]}, "weight_block_size = [rows, columns]"),
    ],
)
def test_other_options_are_refused_by_name(change, words, tmp_path):
    with pytest.raises(CheckpointError) as error:
        fp8.read(options(tmp_path, CONFIG | change))
    assert words in str(error.value)
