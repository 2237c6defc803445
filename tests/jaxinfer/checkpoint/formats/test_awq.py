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


def test_which_modules_are_quantised(tmp_path):
    form = awq.read(options(tmp_path, CONFIG))
    assert form.encoding("model.layers.0.mlp.up_proj") == Encoding("int4", 32, zeros=True)
    assert form.encoding("lm_head") is None and form.encoding("model.layers.0.mlp.gate") is None
    assert form.encoding("model.layers.0.mlp.gate_proj") is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 8}, "quantization_config.bits = 4, found 8"),
        ({"version": "gemv"}, "version = 'gemm' or 'GEMM', found gemv; use a checkpoint packed for version gemm"),
        ({"zero_point": False}, "zero_point = True, found False"),
        ({"zero_point": 1}, "zero_point = True, found 1"),
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
