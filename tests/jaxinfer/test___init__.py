"""The package's public names come on first use."""

import subprocess
import sys

import pytest

import jaxinfer
from jaxinfer.api import LLM, Completion, generate
from jaxinfer.grammar import Grammar
from jaxinfer.request import SamplingParams


def test_public_names_are_the_real_ones():
    assert jaxinfer.Grammar is Grammar
    assert (jaxinfer.LLM, jaxinfer.Completion, jaxinfer.generate, jaxinfer.SamplingParams) == (LLM, Completion, generate, SamplingParams)
    assert set(dir(jaxinfer)) == set(jaxinfer.__all__)
    assert jaxinfer.__version__[0].isdigit()


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'generat'; it offers LLM, .*generate"):
        _ = jaxinfer.generat


def test_import_leaves_jax_alone():
    code = "import sys, jaxinfer; from jaxinfer import SamplingParams; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
