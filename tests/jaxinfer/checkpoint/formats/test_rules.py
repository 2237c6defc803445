"""GPTQModel's rules: which modules are quantised otherwise, or not at all."""

import pytest

from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats.rules import Way, check_tools, read_rules
from tests.quantised_files import options

USUAL = Way(4, 128, symmetric=True)


def test_the_first_rule_that_matches_counts(tmp_path):
    dynamic = {
        r"-:.*\.0\..*up_proj": {},
        r"+:.*up_proj": {"bits": 8, "group_size": -1, "mse": 2.0},
        "lm_head": {"sym": False, "desc_act": True, "group_size": 32},
        r".*gate": {},
    }
    rules = read_rules(options(tmp_path, {"dynamic": dynamic}), USUAL)
    assert rules.of("model.layers.0.mlp.up_proj") is None and rules.of("model.layers.1.mlp.up_proj") == Way(8, None, symmetric=True)
    assert rules.of("lm_head") == Way(4, 32, symmetric=False, ordered=True) and rules.of("my_lm_head") == USUAL == rules.of("a.gate")
    assert read_rules(options(tmp_path, {}), USUAL).of("lm_head") == USUAL == read_rules(options(tmp_path, {"dynamic": {}}), USUAL).of("x")


@pytest.mark.parametrize(
    ("dynamic", "words"),
    [
        ({"+:a": {"bits": 2}}, r"dynamic\.\+:a\.bits = 4 or 8, found 2"),
        ({"a": {"format": "marlin"}}, "found format = 'marlin'"),
        ({"-:(": {}}, "with regular expressions, found '-:\\('"),
        ({"a": 1}, "dynamic.a = an object, found 1"),
        (["a"], "dynamic = an object"),
    ],
)
def test_rules_that_are_not_understood(dynamic, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        read_rules(options(tmp_path, {"dynamic": dynamic}), USUAL)


def test_what_the_tools_write(tmp_path):
    check_tools(options(tmp_path, {"method": "awq", "meta": {"quantizer": ["gptqmodel:7.7.0"]}, "w_bit": 4}), "awq", "w_bit")
    for config, words in (
        ({"method": "gptq"}, "method = None or 'awq', found gptq"),
        ({"pack_dtype": "int64"}, "pack_dtype = None or 'int32', found int64"),
        ({"w_bit": 4}, "found w_bit = 4"),
    ):
        with pytest.raises(CheckpointError, match=words):
            check_tools(options(tmp_path, config), "awq")
