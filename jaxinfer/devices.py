"""The chips: what each one can do, and the only place that asks jax which devices are there.

`CHIPS` has one row per chip. Figures are the vendors' (dense, without sparsity); `doctor` and `bench` measure the machine at hand
beside them. A chip that is not in the table works too, with its memory asked from the runtime.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import jax

GIB = 1 << 30


class DeviceError(ValueError):
    """The machine lacks the devices that were asked for."""


@dataclass(frozen=True)
class Chip:
    """One accelerator: memory in bytes, bandwidth in bytes/s, peak rates in operations/s, on-chip memory in bytes."""

    name: str
    platform: str
    memory: int
    bandwidth: float
    bf16_rate: float
    int8_rate: float
    on_chip: int = 0
    aliases: tuple[str, ...] = ()


CHIPS = (
    Chip("NVIDIA H200", "gpu", 141 * 10**9, 4.8e12, 989e12, 1979e12, 228 << 10),
    Chip("NVIDIA H100", "gpu", 80 * 10**9, 3.35e12, 989e12, 1979e12, 228 << 10, ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe")),
    Chip("NVIDIA B200", "gpu", 180 * 10**9, 8.0e12, 2250e12, 4500e12, 228 << 10),
    Chip("NVIDIA A100", "gpu", 80 * 10**9, 2.04e12, 312e12, 624e12, 164 << 10, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB")),
    Chip("TPU v5e", "tpu", 16 * GIB, 819e9, 197e12, 394e12, 128 << 20, ("TPU v5 lite",)),
    Chip("TPU v5p", "tpu", 95 * GIB, 2765e9, 459e12, 918e12, 128 << 20, ("TPU v5",)),
    Chip("TPU v6e", "tpu", 32 * GIB, 1640e9, 918e12, 1836e12, 128 << 20, ("TPU v6 lite",)),
    Chip("TPU 7x", "tpu", 96 * GIB, 3690e9, 1154e12, 1154e12, 64 << 20, ("TPU7x",)),
)


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
