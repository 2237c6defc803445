"""What the formats share: strict options, names of modules."""

import pytest

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats.quantised import ModuleNames
from tests.quantised_files import options


def test_options_are_read_strictly(tmp_path):
    read = options(tmp_path, {"a": True, "b": 1, "c": {"d": "x"}, "e": [], "group": -1})
    assert read.one_of("a", (True, False)) is True and read.one_of("missing", (None, 2)) is None and read.one_of("b", (2, 1)) == 1
    assert read.group_size("group") is None and read.group_size("missing", default=3) == 3 and read.words("e") == ()
    inside = read.inside("c")
    assert inside is not None and inside.one_of("d", ("x",)) == "x" and read.inside("missing") is None
    with pytest.raises(CheckpointError, match=r"quantization_config\.a = 1, found True"):
        read.one_of("a", (1,))
    with pytest.raises(CheckpointError, match=r"config\.json: expected quantization_config\.c\.d = 'y', found x"):
        inside.one_of("d", ("y",))
    with pytest.raises(CheckpointError, match="b = an object, found 1"):
        read.inside("b")
    with pytest.raises(CheckpointError, match="found e = "):
        read.finish("a b c group")
    read.finish("a b c e group")
    options(tmp_path, {"a": 1, "new_in_a_later_version": None}).finish("a")


def test_names_of_modules():
    names = ModuleNames(("lm_head", "mlp.gate", "re:.*layers\\.0\\..*"))
    assert names.has("lm_head") and names.has("model.layers.3.mlp.gate") and names.has("model.layers.0.x")
    assert not names.has("model.layers.3.mlp.gate_proj") and not names.has("my_lm_head") and not names.has("model.layers.10.x")
