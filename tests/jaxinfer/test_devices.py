"""The table of chips and what the runtime says about devices."""

import subprocess
import sys
from unittest.mock import Mock

import jax
import pytest

from jaxinfer import devices
from jaxinfer.devices import CHIPS, GIB, DeviceError


def device(platform="gpu", kind="NVIDIA H200", stats=None):
    made = Mock(spec=jax.Device)
    made.platform, made.device_kind = platform, kind
    made.memory_stats.return_value = stats
    return made


def test_every_name_means_one_chip():
    names = [name for chip in CHIPS for name in (chip.name, *chip.aliases)]
    assert len(set(names)) == len(names)
    for name in names:
        chip = devices.find_chip(name)
        assert name == chip.name or name in chip.aliases
    assert devices.find_chip("Abacus") is None


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_figures_are_plausible(chip):
    assert chip.platform in ("gpu", "tpu")
    assert 8 * GIB < chip.memory < 1000 * GIB
    assert 5e11 < chip.bandwidth < 2e13
    assert chip.bf16_rate <= chip.int8_rate <= 2.01 * chip.bf16_rate
    assert 100 < chip.bf16_rate / chip.bandwidth < 1000
    assert (1 << 17) <= chip.on_chip <= (256 << 20)


def test_memory_is_what_the_runtime_says_else_the_table_else_half_of_the_host():
    assert devices.memory_bytes(device(stats={"bytes_limit": 5 * GIB})) == 5 * GIB
    assert devices.memory_bytes(device(stats=None)) == devices.find_chip("NVIDIA H200").memory
    host = devices.memory_bytes(jax.devices()[0])
    assert host > GIB // 2
    assert devices.memory_bytes(device(kind="Unknown 9000", stats={})) == host


def test_memory_in_use():
    assert devices.memory_in_use(device(stats={"bytes_in_use": 17})) == 17
    assert devices.memory_in_use(device(stats=None)) is None
    assert devices.memory_in_use(jax.devices()[0]) is None


def test_labels():
    assert devices.label(jax.devices()[0]) == "cpu"
    assert devices.label(device()) == "NVIDIA H200"
    assert devices.platform() == "cpu"


def test_select_takes_the_first_or_says_what_lacks():
    assert devices.select(3) == jax.devices()[:3]
    with pytest.raises(DeviceError, match="needs 9 devices, but 8 cpu"):
        devices.select(9)


def test_preparing_too_late_does_nothing():
    jax.devices()
    devices.prepare(64)
    assert len(jax.devices()) == 8


PROGRAM = """
from jaxinfer import devices
devices.prepare(1)
devices.prepare(3)
devices.prepare(2)
print(len(devices.select(3)), len(__import__("jax").devices()))
"""


@pytest.mark.parametrize(("flags", "printed"), [("", "3 3"), ("--xla_force_host_platform_device_count=5", "3 5")])
def test_a_machine_with_only_a_cpu_shows_as_many_as_are_needed(flags, printed, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=100)
    assert ran.stdout.split() == printed.split(), ran.stderr
