"""Schemes are found by file name."""

import pytest

from jaxinfer.config import ConfigError
from jaxinfer.quant.find import find_scheme, schemes


def test_every_scheme_has_the_three_functions():
    assert "int8" in schemes()
    for name in schemes():
        assert all(callable(getattr(find_scheme(name), function)) for function in ("describe", "scales", "values"))


@pytest.mark.parametrize("name", ["int9", "qarray", "../int8", ""])
def test_others_are_refused_with_the_list(name):
    with pytest.raises(ConfigError, match="there are: fp8, int4, int8, w8a8"):
        find_scheme(name)


def test_the_nearest_name_is_offered():
    with pytest.raises(ConfigError, match="did you mean 'int8'"):
        find_scheme("int_8")
