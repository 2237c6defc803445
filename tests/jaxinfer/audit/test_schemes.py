"""Names of schemes become settings of the engine."""

import pytest

from jaxinfer.audit import schemes
from jaxinfer.config import ConfigError
from jaxinfer.quant import find


def test_every_scheme_of_the_folder_is_known():
    assert set(schemes.known()) == {*find.schemes(), "kv-int8", "kv-fp8"}
    assert list(schemes.read(None, stored=False)) == list(schemes.known())


def test_names_become_settings():
    assert schemes.read("int8, kv-fp8,int8+kv-int8", stored=False) == {
        "int8": {"quantize": "int8"}, "kv-fp8": {"kv_dtype": "fp8"}, "int8+kv-int8": {"quantize": "int8", "kv_dtype": "int8"},
    }  # fmt: skip


def test_schemes_with_exceptions_stand_between_semicolons():
    found = schemes.read("int8; int8,lm_head=keep+kv-int8;", stored=False)
    assert found == {"int8": {"quantize": "int8"}, "int8,lm_head=keep+kv-int8": {"quantize": "int8,lm_head=keep", "kv_dtype": "int8"}}
    assert schemes.read("layers.*=int8;", stored=False) == {"layers.*=int8": {"quantize": "layers.*=int8"}}


def test_a_quantised_checkpoint_is_audited_as_it_is():
    assert schemes.read(None, stored=True) == {"stored": {}}
    assert schemes.read("stored,stored+kv-int8", stored=True) == {"stored": {}, "stored+kv-int8": {"kv_dtype": "int8"}}


@pytest.mark.parametrize(
    ("text", "stored", "said"),
    [
        ("int9", False, "'int9' does not exist; there are: .*int8.*did you mean 'int8'"),
        ("int8,int8", False, "'int8' stands twice"),
        ("", False, "names none"),
        ("int8+int8", False, "more than one scheme for the same numbers"),
        ("int8,lm_head=keep", False, "semicolons"),
        ("stored", False, "'stored' does not exist"),
        ("int8", True, "cannot be asked of a checkpoint that is quantised already"),
        ("kv-int8", True, r"write stored\+kv-int8"),
    ],
)
def test_names_that_mean_nothing(text, stored, said):
    with pytest.raises(ConfigError, match=said):
        schemes.read(text, stored=stored)
