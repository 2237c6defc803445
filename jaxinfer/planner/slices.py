"""Slices by name: `v6e-4`, `v5p-8`, `tpu7x-8`, `h100x8`, `cpu-2` become chips, devices and the topology that a compiler is told.

TPU names count what their vendor counts: chips for v5e and v6e, cores for v5p and 7x (two a chip). jax shows one device a chip on v5p and
two on 7x. Plain Python; nothing here asks a runtime.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from jaxinfer.config import ConfigError, MeshShape

TARGETS = Path(__file__).with_name("targets")
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}


@dataclass(frozen=True)
class Family:
    """Slices of one kind: the device's row in `devices.CHIPS`, sizes in chips with their topologies, what a name counts per chip."""

    chip: str
    topologies: dict[int, str]
    counted: int = 1
    devices: int = 1
    separator: str = "-"


FAMILIES = {
    "v5e": Family("TPU v5e", FLAT),
    "v6e": Family("TPU v6e", FLAT),
    "v5p": Family("TPU v5p", CUBE, counted=2),
    "tpu7x": Family("TPU 7x", CUBE, counted=2, devices=2),
    **{name: Family(f"NVIDIA {name.upper()}", {n: f"1x{n}x1" for n in (1, 2, 4, 8)}, separator="x") for name in ("h100", "h200", "b200")},
    "cpu": Family("cpu", {n: "" for n in (1, 2, 4, 8)}),
}
ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x"}
EXAMPLES = "v5e-8, v6e-4, v5p-8, tpu7x-8, h100x8, h200x1, b200x8"


@dataclass(frozen=True)
class Slice:
    """So many chips of one family, and the devices that jax shows on them."""

    name: str
    family: str
    chip: str
    chips: int
    devices: int
    topology: str

    @property
    def platform(self) -> str:
        """`tpu`, `gpu` or `cpu`."""
        return "tpu" if self.chip.startswith("TPU") else "gpu" if self.chip.startswith("NVIDIA") else "cpu"

    @property
    def described(self) -> str:
        """The topology that the compiler is told of: at least a whole host of a TPU, of which the first devices are used."""
        smallest = {"v5e": "2x2", "v6e": "2x2"}.get(self.family)
        return smallest if smallest and self.chips < 4 else self.topology

    @property
    def target_config(self) -> str:
        """The description of an NVIDIA GPU for a compiler without one."""
        return (TARGETS / f"{self.family}.txtpb").read_text(encoding="utf-8")

    def meshes(self) -> tuple[MeshShape, ...]:
        """Every data x tensor arrangement of all devices, most shards first."""
        sizes = [size for size in range(1, self.devices + 1) if self.devices % size == 0]
        return tuple(MeshShape(data=self.devices // tensor, tensor=tensor) for tensor in reversed(sizes))

    def larger(self) -> tuple[Slice, ...]:
        """The larger slices of the family, smallest first."""
        return tuple(_make(self.family, chips) for chips in FAMILIES[self.family].topologies if chips > self.chips)

    def __str__(self) -> str:
        shown = f"{self.topology} " if self.platform == "tpu" else ""
        return f"{self.name}: {shown}{self.chips} x {self.chip.removesuffix('cpu') or 'virtual CPU device'}, {self.devices} device(s)"


def parse(name: str) -> Slice:
    """Read a slice's name; a bare family with one chip (`h200`, `cpu`) means that.

    Raises:
        ConfigError: an unknown family, or a size that the family does not come in; the message says which there are.
    """
    match = re.fullmatch(r"(cpu|tpu7x|v7x|v5litepod|v5e|v6e|v5p|[hb][12]00)(?:[-x:]?(\d+))?", name.strip().lower())
    if match is None:
        near = difflib.get_close_matches(name, [*FAMILIES, *EXAMPLES.split(", ")], n=1)
        raise ConfigError(f"--slice {name!r} is unknown; write for example {EXAMPLES}{f'; did you mean {near[0]!r}?' if near else ''}")
    key = ALIASES.get(match[1], match[1])
    family = FAMILIES[key]
    count = int(match[2]) if match[2] else family.counted
    if count % family.counted or count // family.counted not in family.topologies:
        sizes = ", ".join(f"{key}{family.separator}{chips * family.counted}" for chips in family.topologies)
        why = f" ({key} counts cores, {family.counted} a chip)" if family.counted > 1 else ""
        raise ConfigError(f"--slice {name!r}: there is no such size{why}; there are {sizes}")
    return _make(key, count // family.counted)


def of_devices(chip: str, devices: int) -> Slice:
    """The slice of so many devices of a chip in `devices.CHIPS` ("cpu" is one too), as jax shows them.

    Raises:
        ConfigError: there is no such slice.
    """
    for key, family in FAMILIES.items():
        chips = devices // family.devices
        if family.chip == chip and devices % family.devices == 0 and chips in family.topologies:
            return _make(key, chips)
    raise ConfigError(f"no slice of {devices} x {chip} is known; name one with --slice, for example {EXAMPLES}")


def _make(key: str, chips: int) -> Slice:
    family = FAMILIES[key]
    name = f"{key}{family.separator}{chips * family.counted}"
    made = Slice(name, key, family.chip, chips, chips * family.devices, family.topologies[chips])
    if made.platform == "tpu" and prod(int(side) for side in made.topology.split("x")) != chips:
        raise ValueError(f"{made.topology} is not {chips} chips")
    return made
