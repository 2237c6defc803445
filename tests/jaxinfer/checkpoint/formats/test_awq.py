"""AWQ int4: bit-exact against the format's definition, strict about what it does not know."""

import numpy as np
import pytest

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats import awq
from jaxinfer.checkpoint.formats.quantised import Encoding
from tests.quantised_files import Matrix, meant, opened, options
from tests.quantised_files import awq as written

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["gate"]}


def test_values_are_those_of_the_definition(tmp_path):
    matrix = Matrix.random(np.random.default_rng(0), 24, 64, 32, lowest_zero=0)
    form, tensors = awq.read(options(tmp_path, CONFIG)), opened(tmp_path, written("a.q_proj", matrix))
    assert {name: (need.shapes, need.dtypes[0]) for name, need in form.needs("a.q_proj", (24, 64)).items()} == {
        name: ((tensor.shape,), "float16" if name.endswith("scales") else "int32") for name, tensor in tensors.items()
    }
    assert np.array_equal(meant(form.stored("a.q_proj", (24, 64), tensors), (24, 64), 32), matrix.exact)


def test_a_symmetric_checkpoint_has_no_zeros_but_8(tmp_path):
    form, words = (
        awq.read(options(tmp_path, CONFIG | {"zero_point": False, "format": "gemm"})),
        r"tensor 'a.qzeros': expected numbers in 0\.\.0",
    )
    assert form.encoding("a") == Encoding("int4", 32)
    matrix = Matrix.random(np.random.default_rng(0), 24, 64, 32, symmetric=True)
    assert np.array_equal(meant(form.stored("a", (24, 64), opened(tmp_path, written("a", matrix))), (24, 64), 32), matrix.exact)
    matrix.zeros[3, 1] = 7
    with pytest.raises(CheckpointError, match=words):
        meant(form.stored("a", (24, 64), opened(tmp_path, written("a", matrix))), (24, 64), 32)


def test_which_modules_are_quantised(tmp_path):
    form = awq.read(options(tmp_path, CONFIG))
    assert form.encoding("model.layers.0.mlp.up_proj") == Encoding("int4", 32, zeros=True)
    assert form.encoding("lm_head") is None and form.encoding("model.layers.0.mlp.gate") is None
    assert form.encoding("model.layers.0.mlp.gate_proj") is not None
    some = awq.read(options(tmp_path, CONFIG | {"dynamic": {"-:.*up_proj": {}, "+:.*down_proj": {"bits": 8}}}))
    assert some.encoding("model.layers.0.mlp.up_proj") is None and some.encoding("model.layers.0.mlp.gate_proj") is not None
    with pytest.raises(CheckpointError, match="down_proj of 4 bits and in the order of its inputs, as AWQ's are, found bits = 8"):
        some.encoding("model.layers.0.mlp.down_proj")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 8}, "quantization_config.bits = 4, found 8"),
        ({"version": "gemv"}, "version = None or 'gemm' or 'GEMM', found gemv; use a checkpoint packed for version gemm"),
        ({"format": "gemv_fast"}, "format = None or 'gemm' or 'GEMM', found gemv_fast"),
        ({"zero_point": 1}, "zero_point = True or False, found 1"),
        ({"desc_act": True}, "desc_act = None or False, found True"),
        ({"group_size": 0}, "group_size = a whole number above 0, or -1, found 0"),
        ({"modules_to_not_convert": "gate"}, "modules_to_not_convert = a list of strings"),
        ({"sparse": 2}, "options of quantization_config that are implemented, found sparse = 2"),
    ],
)
def test_other_options_are_refused_by_name(change, words, tmp_path):
    with pytest.raises(CheckpointError) as error:
        awq.read(options(tmp_path, CONFIG | change))
    assert words in str(error.value) and "config.json" in str(error.value)


def test_a_shape_that_does_not_divide(tmp_path):
    form = awq.read(options(tmp_path, CONFIG))
    with pytest.raises(CheckpointError, match=r"inputs in groups of 32 .* found a of \[24, 40\]"):
        form.needs("a", (24, 40))
