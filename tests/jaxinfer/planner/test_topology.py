"""Devices that are not there; on machines without the compilers, the pip line that brings them."""

import sys
from importlib.util import find_spec

import jax
import pytest

from jaxinfer import devices
from jaxinfer.config import ConfigError
from jaxinfer.models.find import find_shape
from jaxinfer.planner import topology
from jaxinfer.planner.slices import parse
from jaxinfer.planner.telling import GUESS_NOTE
from tests.jaxinfer.planner.conftest import planned


def test_cpu_devices_are_real():
    assert topology.describe(parse("cpu-2")) == jax.devices()[:2]
    assert topology.usable_memory(parse("cpu")) == devices.memory_bytes(jax.devices()[0])
    assert topology.chip_of(parse("cpu")) is topology.CPU


@pytest.mark.parametrize("name", ["v5e-8", "v5p-8", "v6e-4", "tpu7x-8", "h100x8", "h200x1", "b200x1"])
def test_what_a_device_gives_to_arrays_is_less_than_it_has(name):
    piece = parse(name)
    assert 0.7 * topology.chip_of(piece).memory < topology.usable_memory(piece) <= topology.chip_of(piece).memory
    assert topology.chip_of(piece).interconnect > 0


@pytest.mark.parametrize(("name", "line"), [("v5e-8", r"pip install 'jax\[tpu\]=="), ("h100x8", "--no-deps 'jax-cuda13-plugin==")])
def test_a_missing_compiler_is_named_with_the_line_that_brings_it(monkeypatch, name, line):
    monkeypatch.setattr(topology, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=line):
        topology.describe(parse(name))


@pytest.mark.parametrize("name", ["v5e-8", "v5p-8", "v6e-4", "tpu7x-8", "h100x8", "h200x1", "b200x8"])
def test_kernels_are_chosen_without_a_compiler(monkeypatch, name):
    """As `auto` chooses them with one: by the device's kind, from our own table."""
    monkeypatch.setattr(topology, "find_spec", lambda _: None)
    piece, values = parse(name), {**find_shape("llama-3.1-8b"), "num_hidden_layers": 1}
    plan = planned(name, values=values, context=4096, config={"page_size": 64, "dtype": "bfloat16"})
    hopper = name[:4] in ("h100", "h200") and jax.__version_info__ >= (0, 11)
    expected = "tpu" if piece.platform == "tpu" else "gpu" if hopper else "xla"
    assert (plan.settings["attention"], plan.target["devices"]) == (expected, piece.devices)
    assert len(plan.meshes) == len(piece.meshes()) and plan.notes[0] == GUESS_NOTE


def test_nothing_is_missing_for_cpus():
    assert topology.missing_packages(parse("cpu-8")) is None
    assert (topology.missing_packages(parse("v5e-8")) is None) == (find_spec("libtpu") is not None)
    assert "libtpu" not in sys.modules
