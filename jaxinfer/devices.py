"""The chips: what each one can do, and the only place that asks jax which devices are there.

`CHIPS` has one row per chip. Figures are the vendors' (dense, without sparsity); `doctor` and `bench` measure the machine at hand
beside them. A chip that is not in the table works too, with its memory asked from the runtime.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import jax

GIB = 1 << 30


class DeviceError(ValueError):
    """The machine lacks the devices that were asked for."""


@dataclass(frozen=True)
class Chip:
    """One device as jax shows it (half a chip on TPU 7x): memory in bytes, bandwidth in bytes/s, peak rates in operations/s, memory on it.

    usable: bytes that jax's runtime gives to arrays unless told otherwise (on GPUs 3/4 of the memory: XLA_PYTHON_CLIENT_MEM_FRACTION).
    interconnect: bytes/s to its neighbours in one direction, over all links that one collective can use (NVLink; one ICI axis, both ways).
    """

    name: str
    platform: str
    memory: int
    bandwidth: float
    bf16_rate: float
    int8_rate: float
    on_chip: int = 0
    aliases: tuple[str, ...] = ()
    fp8_rate: float = 0.0
    usable: int = 0
    interconnect: float = 0.0


CHIPS = (
    Chip("NVIDIA H200", "gpu", 141 * 10**9, 4.8e12, 989e12, 1979e12, 228 << 10, (), 1979e12, 112_600 * 10**6, 450e9),
    Chip(
        "NVIDIA H100", "gpu", 80 * 10**9, 3.35e12, 989e12, 1979e12, 228 << 10, ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"), 1979e12,
        63_600 * 10**6, 450e9,
    ),
    Chip("NVIDIA B200", "gpu", 180 * 10**9, 8.0e12, 2250e12, 4500e12, 228 << 10, (), 4500e12, 143_600 * 10**6, 900e9),
    Chip("NVIDIA A100", "gpu", 80 * 10**9, 2.04e12, 312e12, 624e12, 164 << 10, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB")),
    Chip("TPU v5e", "tpu", 16 * GIB, 819e9, 197e12, 394e12, 128 << 20, ("TPU v5 lite",), 0.0, 63 * GIB // 4, 90e9),
    Chip("TPU v5p", "tpu", 95 * GIB, 2765e9, 459e12, 918e12, 128 << 20, ("TPU v5",), 0.0, 95 * GIB, 180e9),
    Chip("TPU v6e", "tpu", 32 * GIB, 1640e9, 918e12, 1836e12, 128 << 20, ("TPU v6 lite",), 0.0, 125 * GIB // 4, 180e9),
    Chip("TPU 7x", "tpu", 96 * GIB, 3690e9, 1154e12, 1154e12, 64 << 20, ("TPU7x",), 2307e12, 94 * GIB, 180e9),
)  # fmt: skip


def find_chip(kind: str) -> Chip | None:
    """The table's row for jax's `device_kind`, None for a chip that is not in it."""
    return next((chip for chip in CHIPS if kind == chip.name or kind in chip.aliases), None)


def prepare(count: int) -> None:
    """Before the first use of a device: let a machine with only a CPU show `count` virtual devices.

    On machines with accelerators the setting does not matter. Does nothing once devices were used (then `select` says what lacks).
    """
    if count == 1 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        if int(jax.config.jax_num_cpu_devices) < count:  # pyright: ignore[reportAttributeAccessIssue]
            jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return


def select(count: int) -> list[jax.Device]:
    """The first `count` devices, in the runtime's order.

    Raises:
        DeviceError: the machine has fewer.
    """
    devices = jax.devices()
    if len(devices) < count:
        raise DeviceError(
            f"the mesh needs {count} devices, but {len(devices)} {devices[0].platform} device(s) are there;"
            " make it smaller, or build the engine before jax is first used"
        )
    return devices[:count]


def environment_for_described(platform: str, package: Path) -> dict[str, str]:
    """The environment of a process that compiles for devices that are not there: its own backend is the CPU. package: the folder that
    holds our packages, in case they are not installed."""
    quiet = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    own = {"tpu": {"TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3"}, "gpu": {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}}
    path = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    return {**os.environ, **quiet, "PYTHONPATH": path, **own.get(platform, {})}


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: where programs run by default."""
    return jax.default_backend()


def label(device: jax.Device) -> str:
    """How a device is called in messages and measurements."""
    return device.device_kind if device.platform != "cpu" else "cpu"


def memory_bytes(device: jax.Device) -> int:
    """Memory that one device can give to arrays, in bytes: the runtime's limit, else the table's, else half of the host's memory."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        chip = find_chip(device.device_kind)
        known = stats.get("bytes_limit") or (chip.memory if chip else 0)
        if known:
            return int(known)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def memory_in_use(device: jax.Device) -> int | None:
    """Bytes that arrays take on a device now, None where the runtime does not say (CPUs)."""
    return (device.memory_stats() or {}).get("bytes_in_use")
