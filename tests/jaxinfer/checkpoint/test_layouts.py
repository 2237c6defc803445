"""What is written is what compressed-tensors says, and reads back as the same scheme."""

import numpy as np
import pytest

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats import compressed_tensors
from jaxinfer.checkpoint.formats.quantised import Encoding
from jaxinfer.checkpoint.layouts import layout_of, quantization_config
from jaxinfer.quant.find import find_scheme, schemes
from jaxinfer.quant.qarray import FP8
from jaxinfer.quant.qarray import describe as described
from jaxinfer.sharding import ArraySpec
from tests.quantised_files import options, pack

SPEC = ArraySpec((4, 64), np.dtype(np.float32), (None, None))


def layout(scheme):
    return layout_of(find_scheme(scheme).describe(SPEC, 1), 1)


@pytest.mark.parametrize("scheme", schemes())
def test_the_config_reads_back_as_the_scheme(scheme, tmp_path):
    form = compressed_tensors.read(options(tmp_path, quantization_config({"a": layout(scheme)}, ["b"])))
    assert form.encoding("a") == Encoding(scheme, layout(scheme).group) and form.encoding("b") is None and form.encoding("lm_head") is None
    arrays = {f"a.{suffix}": (shape, dtype.name) for suffix, _, dtype, shape in layout(scheme).arrays((4, 64))}
    assert all(arrays[name][0] in need.shapes and arrays[name][1] in need.dtypes for name, need in form.needs("a", (4, 64)).items())
    assert tuple(name[2:] for name in arrays) == layout(scheme).suffixes


def test_several_schemes_in_one_checkpoint(tmp_path):
    config = quantization_config({"a": layout("int4"), "b": layout("w8a8"), "c": layout("int4"), "lm_head": layout("fp8")}, ["d"])
    assert config["format"] == "mixed-precision" and config["ignore"] == ["d"]
    form = compressed_tensors.read(options(tmp_path, config))
    found = {name: encoding.scheme if (encoding := form.encoding(name)) else None for name in ("a", "b", "c", "d", "lm_head")}
    assert found == {"a": "int4", "b": "w8a8", "c": "int4", "d": None, "lm_head": "fp8"}


def test_numbers_are_packed_as_the_format_says():
    draw = np.random.default_rng(0)
    for scheme, bits in (("int8", 8), ("int4", 4)):
        numbers = draw.integers(0, 1 << bits, (3, 24 if bits == 4 else 10))
        values = (numbers - 128).astype(np.int8) if bits == 8 else (numbers[:, 0::2] | numbers[:, 1::2] << 4).astype(np.uint8)
        assert np.array_equal(layout(scheme).stored(values), pack(numbers, bits, 1))
    plain = draw.integers(-127, 128, (3, 8)).astype(np.int8)
    assert layout("w8a8").stored(plain) is plain


def test_what_has_no_layout_is_refused():
    tiles = described(SPEC, 1, (2, 32), FP8, scheme="fp8")
    with pytest.raises(CheckpointError, match="scheme 'fp8' has no layout in compressed-tensors here; write --format orbax"):
        layout_of(tiles, 1)
