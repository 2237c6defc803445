"""Formats are found by quant_method; others are refused."""

import pytest

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats.find import format_of, formats
from tests.quantised_files import weights_config


def test_every_format_has_a_name(tmp_path):
    assert set(formats()) == {"awq", "compressed-tensors", "fp8", "gptq"}
    assert format_of({"quantization_config": weights_config(format="int-quantized")}, tmp_path / "config.json") is not None
    assert format_of({}, tmp_path) is None and format_of({"quantization_config": None}, tmp_path) is None


@pytest.mark.parametrize("method", ["bitsandbytes", None, 4])
def test_others_are_refused(method, tmp_path):
    with pytest.raises(CheckpointError) as error:
        format_of({"quantization_config": {"quant_method": method, "x": 1}}, tmp_path / "config.json")
    assert "quant_method = 'awq' or" in str(error.value) and "an unquantised one with --quantize" in str(error.value)
    with pytest.raises(CheckpointError, match=r"config\.json\.quantization_config = an object, found \[\]"):
        format_of({"quantization_config": []}, tmp_path / "config.json")
