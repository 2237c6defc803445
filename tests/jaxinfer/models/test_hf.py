"""A config.json is read strictly, and what would change the arithmetic is never skipped."""

import logging

import pytest

from jaxinfer.config import ConfigError
from jaxinfer.models.hf import HARMLESS, UNUSED_VALUES, Fields


def test_reads_what_is_there_and_defaults_for_null():
    fields = Fields({"size": 4, "eps": 1, "tied": True, "act": None, "rope": {"a": 1}, "empty": {}})
    assert fields.integer("size") == 4
    assert fields.number("eps") == 1.0
    assert fields.flag("tied", default=False) and not fields.flag("missing", default=False)
    assert fields.choice("act", ("silu",), default="silu") == "silu"
    assert fields.table("rope") == {"a": 1} and fields.table("empty") is None and fields.table("absent") is None


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda f: f.integer("text"), "config.json: text must be a whole number from 1 up, found 'abc'"),
        (lambda f: f.integer("half"), "found 0.5"),
        (lambda f: f.number("huge"), "huge must be a finite number above 0, found inf"),
        (lambda f: f.number("flag"), "flag must be a finite number"),
        (lambda f: f.flag("half", default=True), "half must be true or false"),
        (lambda f: f.choice("text", ("silu", "gelu"), default="silu"), "text must be one of silu, gelu"),
        (lambda f: f.table("half"), "half must be an object"),
        (lambda f: f.integer("absent"), "config.json has no absent"),
        (lambda f: f.table("long"), "..."),
    ],
)
def test_names_the_field_what_was_expected_and_what_was_found(read, words):
    with pytest.raises(ConfigError) as error:
        read(Fields({"text": "abc", "half": 0.5, "huge": float("inf"), "flag": True, "long": "x" * 500}))
    assert words in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize("name", sorted(UNUSED_VALUES))
def test_settings_that_change_the_arithmetic_are_refused(name):
    for unused in UNUSED_VALUES[name]:
        Fields({name: unused}).finish()
    with pytest.raises(ConfigError, match=f"{name} = .* is not implemented"):
        Fields({name: 7.5}).finish()


def test_a_setting_that_was_read_is_not_refused():
    fields = Fields({"sliding_window": 128})
    assert fields.integer("sliding_window") == 128
    fields.finish()


def test_unknown_fields_are_logged(caplog):
    with caplog.at_level(logging.WARNING):
        Fields({"brand_new": 1, "torch_dtype": "float16", "size": 2}).finish()
    assert "brand_new, size" in caplog.text and "torch_dtype" not in caplog.text
    assert not HARMLESS & set(UNUSED_VALUES)
