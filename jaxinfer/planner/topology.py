"""Devices that are not there, as the compilers of their vendors describe them; the only file that knows how those are asked.

TPU: libtpu, which brings the real compiler. NVIDIA: jax's CUDA plugin with a text description of the GPU, no driver. CPU: virtual
devices of this machine. Two GPU targets in one process disturb each other, so a process describes one slice only.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

from jaxinfer import devices
from jaxinfer.config import ConfigError
from jaxinfer.devices import Chip
from jaxinfer.planner.slices import Slice

CPU = Chip("cpu", "cpu", 0, 30e9, 145e9, 145e9, interconnect=10e9)  # two cores of an AMD EPYC (LOG.md), float32


def chip_of(piece: Slice) -> Chip:
    """The row of the slice's devices; memory and rates of "cpu" are those of a small machine."""
    return devices.find_chip(piece.chip) or CPU


def usable_memory(piece: Slice) -> int:
    """Bytes that a device of the slice gives to arrays: what jax's runtime takes by default, on CPUs what the engine would take here."""
    return chip_of(piece).usable or devices.memory_bytes(jax.devices("cpu")[0])


def missing_packages(piece: Slice) -> str | None:
    """The pip line that brings the slice's compiler, None where it is there."""
    if piece.platform == "tpu" and find_spec("libtpu") is None:
        return f"pip install 'jax[tpu]=={jax.__version__}'"
    cuda = [name for name in ("jax_cuda13_plugin", "jax_cuda12_plugin") if find_spec(name) is not None]
    if piece.platform == "gpu" and not cuda:
        return f"pip install --no-deps 'jax-cuda13-plugin=={jax.__version__}' 'jax-cuda13-pjrt=={jax.__version__}'"
    return None


def describe(piece: Slice) -> list[Any]:
    """The slice's devices, for meshes that programs are compiled for.

    Raises:
        ConfigError: the compiler's package is missing; the message has the pip line.
    """
    line = missing_packages(piece)
    if line is not None:
        raise ConfigError(
            f"compiling for {piece.name} needs a compiler that is not installed here: {line}\n"
            "or add --no-compile: arithmetic alone, with what programs need guessed"
        )
    if piece.platform == "cpu":
        devices.prepare(piece.devices)
        return devices.select(piece.devices)
    if piece.platform == "tpu":
        name = f"{piece.family}:{piece.described}"
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    else:
        found = topologies.get_topology_desc("", platform="cuda", target_config=piece.target_config, topology=piece.described)
    return list(found.devices)[: piece.devices]


def stand_ins(piece: Slice) -> tuple[Any, ...]:
    """What arithmetic needs of a slice's devices: a device of this machine, standing for each of them."""
    return tuple(describe(piece)) if piece.platform == "cpu" else (jax.devices("cpu")[0],)


def tabled(sizes: dict[str, int], piece: Slice) -> AbstractMesh:
    """A mesh of the slice's devices from our own table: enough to choose kernels by, without any compiler."""
    chip = chip_of(piece)
    device = AbstractDevice(device_kind=(*chip.aliases, chip.name)[0], num_cores=None, platform=piece.platform)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), abstract_device=device)
