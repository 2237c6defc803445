"""Engines to be measured beside each other, as `--beside` names them."""

import pytest

from jaxinfer.bench import variants
from jaxinfer.config import ConfigError, MeshShape


def test_the_engine_as_given_comes_first():
    base, other = variants.read(["prefix_caching=off,dtype=bfloat16"], {"page_size": 64, "dtype": "float16"})
    assert (base.name, other.name) == ("as given", "prefix-caching=off,dtype=bfloat16")
    assert (base.config.cache.prefix_caching, base.config.model.dtype, base.config.cache.page_size) == ("on", "float16", 64)
    assert (other.config.cache.prefix_caching, other.config.model.dtype, other.config.cache.page_size) == ("off", "bfloat16", 64)


def test_values_are_read_as_flags_are():
    _, one, two = variants.read(["kv-tokens=8k,max-sequences=3", "mesh=data=2,tensor=4,overlap=off"], {})
    assert (one.config.cache.kv_tokens, one.config.scheduler.max_sequences) == (8192, 3)
    assert (two.config.execution.mesh, two.config.execution.overlap) == (MeshShape(2, 4), "off")
    assert two.name == "mesh=data=2,tensor=4,overlap=off"


def test_memory_is_shared_unless_the_pool_has_a_size():
    fractions = [variant.config.cache.memory_fraction for variant in variants.read(["overlap=off", "deterministic=on"], {})]
    assert fractions == pytest.approx([0.3] * 3)
    assert variants.read([], {"memory_fraction": 0.5})[0].config.cache.memory_fraction == 0.5
    given = variants.read(["overlap=off"], {"kv_tokens": 4096, "memory_fraction": 0.8})
    assert [variant.config.cache.memory_fraction for variant in given] == [0.8, 0.8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("overlop=off", "'overlop' is no setting; there are: bundle, .*compilation-cache, .*overlap.*revision"),
        ("tensor=2", "'tensor' is no setting"),
        ("", "'' is no setting"),
        ("overlap", "write overlap=VALUE"),
        ("overlap=maybe", "--overlap: invalid choice: 'maybe' .choose from '?on'?, '?off'?"),
        ("overlap=", "--overlap: invalid choice: ''"),
        ("max-sequences=many", "--max-sequences: invalid int value: 'many'"),
        ("max-sequences=0", "--max-sequences 0 is below 1"),
        ("mesh=rows=2", "--mesh.*axes data, tensor"),
        ("policy=mine", "--policy 'mine' is unknown; choose one of fcfs"),
        ("quantize=int3", "'int3' does not exist; there are: fp8, int4, int8, w8a8"),
        ("overlap=on,overlap=off", "overlap is given twice"),
    ],
)
def test_what_cannot_be_is_said(text, message):
    with pytest.raises(ConfigError, match=rf"^--beside {text}: .*{message}"):
        variants.read([text], {})


def test_a_variant_given_twice():
    with pytest.raises(ConfigError, match="--beside prefix_caching=off: given twice"):
        variants.read(["prefix-caching=off", "prefix_caching=off"], {})
