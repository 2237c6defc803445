"""GPTQ int4: bit-exact against the format's definition, both conventions of zeros, orders of groups, and what is refused."""

import numpy as np
import pytest

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats import gptq
from jaxinfer.checkpoint.formats.quantised import Encoding
from tests.quantised_files import Matrix, meant, opened, options, pack
from tests.quantised_files import gptq as written

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False, "true_sequential": True}
SHAPE = (24, 64)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", [None, [2, 0, 3, 1]], ids=["in order", "groups in another order"])
def test_values_are_those_of_the_definition(version, order, tmp_path):
    matrix = Matrix.random(np.random.default_rng(version), *SHAPE, 16, lowest_zero=1)
    if version == 1:
        matrix.zeros[0, 0] = 16  # 15 is stored
    config = CONFIG | {"desc_act": order is not None} | ({"checkpoint_format": "gptq_v2"} if version == 2 else {})
    form, tensors = gptq.read(options(tmp_path, config)), opened(tmp_path, written("q", matrix, version=version, order=order))
    assert all(tensors[name].shape in need.shapes for name, need in form.needs("q", SHAPE).items())
    assert np.array_equal(meant(form.stored("q", SHAPE, tensors), SHAPE, 16), matrix.exact)


def test_which_modules_are_quantised(tmp_path):
    form = gptq.read(options(tmp_path, CONFIG))
    assert form.encoding("model.layers.3.mlp.up_proj") == Encoding("int4", 16, zeros=True) and form.encoding("lm_head") is None
    blocks = {"modules_in_block_to_quantize": [["mlp.up_proj"], ["q_proj"]]}
    some = gptq.read(options(tmp_path, CONFIG | {"lm_head": True, "sym": True} | blocks))
    assert some.encoding("lm_head") == Encoding("int4", 16) == some.encoding("model.layers.3.mlp.up_proj")
    assert some.encoding("model.layers.3.mlp.down_proj") is None


def test_columns_in_the_order_of_activations(tmp_path):
    matrix, place = Matrix.random(np.random.default_rng(0), *SHAPE, 16), np.random.default_rng(1).permutation(64)
    exact, tensors = np.zeros_like(matrix.exact), written("q", matrix)
    exact[:, place] = matrix.exact
    matrix.q[:, place] = matrix.q.copy()
    tensors["q.qweight"], groups = written("q", matrix)["q.qweight"], tensors["q.g_idx"].copy()
    tensors["q.g_idx"][place] = groups
    form = gptq.read(options(tmp_path, CONFIG | {"desc_act": True}))
    assert form.encoding("q") == Encoding("int4", 16, zeros=True, ordered=True)
    assert np.array_equal(meant(form.stored("q", SHAPE, opened(tmp_path, tensors)), SHAPE, 16), exact)
    with pytest.raises(CheckpointError, match=r"tensor 'q.g_idx': expected inputs in their order, as desc_act is false"):
        gptq.read(options(tmp_path, CONFIG)).stored("q", SHAPE, opened(tmp_path, tensors))
    for bad, words in (([0, 1, 2, 4], r"groups in 0\.\.3, found 4"), ([0, 1, 2, 2], r"16 columns in each group, found 32 in group 2")):
        tensors["q.g_idx"] = np.repeat(np.array(bad, np.int32), 16)
        with pytest.raises(CheckpointError, match=rf"tensor 'q.g_idx': expected {words}"):
            form.stored("q", SHAPE, opened(tmp_path, tensors))


def test_numbers_of_8_bits(tmp_path):
    draw = np.random.default_rng(3)
    q, scales = draw.integers(0, 256, SHAPE), draw.uniform(1e-3, 1e-2, (24, 4)).astype(np.float16)
    form = gptq.read(options(tmp_path, CONFIG | {"bits": 8, "sym": True, "group_size": 16}))
    tensors = opened(
        tmp_path, {"q.qweight": pack(q.T, 8, 0), "q.qzeros": pack(np.full((4, 24), 127), 8, 1), "q.scales": np.ascontiguousarray(scales.T)}
    )
    assert form.encoding("q") == Encoding("int8", 16)
    assert all(tensors[name].shape in need.shapes for name, need in form.needs("q", SHAPE).items())
    exact = (q - 128).astype(np.float32) * np.repeat(scales.astype(np.float32), 16, axis=1)
    assert np.array_equal(meant(form.stored("q", SHAPE, tensors), SHAPE, 16), exact)
    with pytest.raises(CheckpointError, match="expected q symmetric, as numbers of 8 bits have to be, found sym = False"):
        gptq.read(options(tmp_path, CONFIG | {"bits": 8})).encoding("q")


def test_a_symmetric_checkpoint_with_other_zeros_is_refused_when_read(tmp_path):
    form = gptq.read(options(tmp_path, CONFIG | {"sym": True}))
    for symmetric in (True, False):
        matrix = Matrix.random(np.random.default_rng(0), *SHAPE, 16, symmetric=symmetric)
        stored = form.stored("q", SHAPE, opened(tmp_path, written("q", matrix)))
        if symmetric:
            assert np.array_equal(meant(stored, SHAPE, 16), matrix.exact)
        else:
            with pytest.raises(CheckpointError, match=r"tensor 'q.qzeros': expected numbers in 0\.\.0"):
                meant(stored, SHAPE, 16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 3}, "bits = 4 or 8, found 3"),
        ({"method": "qqq"}, "method = None or 'gptq', found qqq"),
        ({"is_marlin_format": True}, "is_marlin_format = None or False, found True; use a checkpoint that is not packed for one kernel"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format = 'gptq' or 'gptq_v2', found marlin; use a checkpoint in the format gptq"),
        ({"dynamic": {"lm_head": {"bits": 3}}}, "dynamic.lm_head.bits = 4 or 8, found 3"),
        ({"desc_act": "yes"}, "desc_act = True or False, found yes"),
        ({"rotation": "hadamard"}, "found rotation = 'hadamard'; ignoring it could change the weights"),
        ({"modules_in_block_to_quantize": [[1]]}, "lists of names"),
    ],
)
def test_other_options_are_refused_by_name(change, words, tmp_path):
    with pytest.raises(CheckpointError) as error:
        gptq.read(options(tmp_path, CONFIG | change))
    assert words in str(error.value)
