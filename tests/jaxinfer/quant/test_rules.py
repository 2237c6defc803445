"""Rules: the first pattern that matches decides, the command line reads and writes them, and nothing is ignored in silence."""

import pytest

from jaxinfer.config import ConfigError
from jaxinfer.quant.rules import Quantization

NAMES = ("layers.0.mlp.down.weight", "layers.0.attention.out.weight", "layers.10.mlp.down.weight", "lm_head.weight")


def test_the_first_rule_that_matches_decides():
    rules = Quantization.parse("int8, lm_head=keep,layers.0.*=keep,layers.*.mlp.*=int4")
    assert [rules.scheme_of(name) for name in NAMES] == ["keep", "keep", "int4", "keep"]
    assert rules.scheme_of("layers.1.attention.out.weight") == "int8"
    rules.check(NAMES)


def test_without_a_scheme_for_all_the_rest_stays():
    rules = Quantization.parse("layers.*=int8")
    assert (rules.scheme_of(NAMES[0]), rules.scheme_of(NAMES[3])) == ("int8", "keep")


@pytest.mark.parametrize("text", ["int8", "keep,layers.*=int4", "fp8,lm_head=keep,layers.0.*=w8a8"])
def test_is_written_as_it_is_read(text):
    assert str(Quantization.parse(text)) == text
    assert Quantization.parse(str(Quantization.parse(text))) == Quantization.parse(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int9", "'int9' does not exist.*did you mean"),
        ("int8,lm_head=kept", "'kept' does not exist"),
        ("int8,fp8", "'int8' and 'fp8' cannot both be for all weights; write PATTERN=fp8"),
        ("int8,,", "neither SCHEME nor PATTERN=SCHEME"),
        ("=int8", "neither SCHEME nor PATTERN=SCHEME"),
        ("int8,lm_head=", "neither SCHEME nor PATTERN=SCHEME"),
        ("", "neither SCHEME nor PATTERN=SCHEME"),
    ],
)
def test_what_cannot_be_read_is_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        Quantization.parse(text)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"'lmhead' matches no weight.*the nearest name is 'lm_head'"):
        Quantization("int8", (("lmhead", "keep"),)).check(NAMES)
