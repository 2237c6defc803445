"""Frequencies against the formulas written out one by one; both forms of config.json."""

import math

import numpy as np
import pytest

from jaxinfer.config import ConfigError
from jaxinfer.models.hf import Fields
from jaxinfer.models.rope import Llama3Scaling, Rope

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope(**config):
    return Rope.from_hf(Fields(config))


def test_plain_and_linear():
    plain = rope(rope_theta=500.0).frequencies(8)
    assert plain.dtype == np.float32
    assert np.allclose(plain, [500.0 ** (-2 * i / 8) for i in range(4)], rtol=1e-7)
    scaled = rope(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4.0}).frequencies(8)
    assert np.array_equal(scaled, plain / 4)


def test_llama3_keeps_short_waves_stretches_long_ones_and_blends_between():
    found = rope(rope_theta=500000.0, rope_scaling=LLAMA3).frequencies(128)
    for i, frequency in enumerate(found):
        plain = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            expected = plain
        elif wavelength > 8192 / 1:
            expected = plain / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * plain / 8 + smooth * plain
        assert frequency == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 7.0, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 7.0}},
        {"rope_theta": 7.0, "rope_parameters": LLAMA3},
        {"rope_theta": 7.0, "rope_parameters": LLAMA3, "rope_scaling": LLAMA3},
    ],
)
def test_both_forms_of_config_say_the_same(config):
    assert rope(**config) == Rope(7.0, 8.0, Llama3Scaling(1.0, 4.0, 8192.0))


def test_nothing_said_is_the_default():
    assert rope() == rope(rope_scaling=None) == rope(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}) == Rope(10000.0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type must be one of default, linear, llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "type must be one of default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "config.json: rope has no factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor must be a finite number above 0"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor must be above low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}}, "no original_max_position_embeddings"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not implemented"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": LLAMA3}, "describes rope twice"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_theta": 0}, "rope_theta must be a finite number above 0"),
    ],
)
def test_others_are_refused_by_name(config, words):
    with pytest.raises(ConfigError) as error:
        rope(**config)
    assert words in str(error.value)
