"""Generations of TPU that kernels are written for: one row each. Imports nothing of jax: `tuning` asks it on every machine.

Rates and bandwidth are the vendor's, of one device as jax shows it (half a chip on 7x); a test holds them against `jaxinfer/devices.py`.
"""

import re
from typing import NamedTuple

UNITS = 4  # matrix units of a core; assumed for all of them: the clocks that follow are then the known ones


class Generation(NamedTuple):
    """VMEM bytes of a core, cores that one device has, side of the matrix unit; bytes/s, operations/s in bfloat16 and in int8 of all cores
    of a device; the kind that jax names such a device by; the smallest slice that libtpu describes."""

    name: str
    vmem: int
    cores: int
    side: int
    bandwidth: float
    bf16_rate: float
    int8_rate: float
    kind: str
    topology: str

    @property
    def clock(self) -> float:
        """Cycles of a core a second: what its matrix units need for the rate."""
        return self.bf16_rate / (self.cores * UNITS * 2 * self.side**2)


V5E = Generation("v5e", 128 << 20, 1, 128, 819e9, 197e12, 394e12, "TPU v5 lite", "v5e:2x2")
V5P = Generation("v5p", 64 << 20, 2, 128, 2765e9, 459e12, 918e12, "TPU v5", "v5p:2x2x1")
V6E = Generation("v6e", 128 << 20, 1, 256, 1640e9, 918e12, 1836e12, "TPU v6 lite", "v6e:2x2")
V7X = Generation("7x", 64 << 20, 1, 256, 3690e9, 1154e12, 1154e12, "TPU7x", "tpu7x:2x2x1")

PATTERNS = (
    (re.compile(r"v5 ?lite|v5e", re.I), V5E),
    (re.compile(r"v5", re.I), V5P),
    (re.compile(r"v6", re.I), V6E),
    (re.compile(r"7x|v7", re.I), V7X),
)
BY_NAME = {each.name: each for _, each in PATTERNS}


def find(device: str) -> Generation | None:
    """Of a device kind such as "TPU v5 lite"; None for what is no TPU or one that these kernels do not know."""
    if "tpu" not in device.lower():
        return None
    return next((which for pattern, which in PATTERNS if pattern.search(device)), None)
