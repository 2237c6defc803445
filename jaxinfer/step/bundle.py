"""Bundles: the programs of one engine, compiled beforehand and perhaps elsewhere, in a folder; loaded instead of compiled.

`bundle.json` records everything that decides the programs: versions, a hash of the sources that make them, the device, the model, mesh,
pool and bucket list, and for each program the arguments it was compiled for. `open_bundle` reads it and compares every file with the
manifest of hashes; `adopt` gives an engine the settings that the bundle was made with; `check_machine` and `check` refuse what differs;
`Loader` is the source of a `Program` then. Nothing in a bundle is pickled, but its programs are machine code: take bundles from those
alone whom you would let run programs. The planner writes bundles (planner/bundling.py).
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import pallas_kernels
from jaxinfer import devices
from jaxinfer.checkpoint import manifest
from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.json_files import read_json
from jaxinfer.config import ConfigError, EngineConfig, MeshShape
from jaxinfer.models.graph import Graph
from jaxinfer.step.executable import Call, Made, load
from jaxinfer.step.keys import ProgramConfig
from jaxinfer.step.sizes import ProgramSize

logger = logging.getLogger(__name__)
HEADER, VERSION = "bundle.json", 1
REMEDY = "copy the bundle again, or make it anew"
SOURCES = ("batch.py", "sampling.py", "sharding.py", "cache", "models", "quant", "step")  # of jaxinfer: what programs are made from
RUNTIMES = {"gpu": ("jax-cuda12-pjrt", "jax-cuda13-pjrt"), "tpu": ("libtpu",)}  # packages that bring the compiler
FLAGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")
PLACES = ("draft_model",)  # settings that say where something lies: what lies there is compared, not its name
CODE = tuple("avx sse ssse fma f16c bmi abm popcnt aes vaes pclmul vpclmul gfni sha amx movbe adx".split())  # beginnings of x86's names


class BundleMismatch(ConfigError):
    """A bundle that was made for something else than what is running."""


@dataclass(frozen=True)
class Bundle:
    """A folder of compiled programs whose files are what they were when they were written."""

    folder: Path
    header: Mapping[str, Any]

    @property
    def pages(self) -> int:
        """Pages of the KV pool that the programs were compiled for, per replica, the guard page included."""
        return self.header["programs_for"]["pages"]

    @property
    def needed(self) -> int:
        """Bytes that the programs take on a device."""
        return self.header["bytes_beside"]

    @property
    def mosaic(self) -> bool:
        """Whether programs have kernels that want Mosaic GPU's runtime."""
        return any(entry["mosaic"] for entry in self.header["programs"].values())

    def adopt(self, config: EngineConfig) -> EngineConfig:
        """The settings with those that decide the programs as the bundle has them, where they stand at their defaults.

        A flag that repeats a default cannot be told from none: the bundle's setting is taken there too, and the log says so.

        Raises:
            BundleMismatch: others were given.
        """
        recorded = {**self.header["settings"], "mesh": MeshShape(*self.header["settings"]["mesh"])}
        taken, differing = dict[str, dict[str, Any]](), []
        for section in fields(config):
            values, changed = getattr(config, section.name), {}
            for item in (item for item in fields(values) if item.name in recorded):
                given, own = getattr(values, item.name), recorded[item.name]
                if given == item.default:
                    changed[item.name] = own
                elif given != own and item.name not in PLACES:
                    differing.append(f"{_flag(item.name)} is {_short(own)} in the bundle, {_short(given)} was asked for")
            taken[section.name] = changed
        self._refuse(differing)
        adopted = replace(config, **{name: replace(getattr(config, name), **changed) for name, changed in taken.items()})
        if adopted != config:
            said = (f"{_flag(name)} {_short(own)}" for changed in taken.values() for name, own in changed.items() if own is not None)
            logger.info("settings of --bundle %s: %s", self.folder, " ".join(said))
        return adopted

    def check_machine(self) -> None:
        """Compare versions and devices with those here.

        Raises:
            BundleMismatch: something differs; the message says what and what to do.
        """
        count = self.header["devices"]
        devices.prepare(count)
        here = jax.devices()
        differing = _differences(self.header["machine"], machine(here[0]))
        lacking = sorted(set(self.header["cpu_features"]) - set(cpu_features()))
        if lacking and here[0].platform == "cpu":
            differing.append(f"this processor lacks {' '.join(lacking)}")
        if len(here) < count:
            differing.append(f"it needs {count} devices, {len(here)} are here")
        self._refuse(differing)

    def check(self, config: ProgramConfig) -> None:
        """Compare everything else that decides the programs, and their names.

        Raises:
            BundleMismatch: something differs; the message says what and what to do.
        """
        differing = _differences(self.header["programs_for"], programs_for(config))
        lacking = [str(key) for key in config.keys if str(key) not in self.header["programs"]]
        self._refuse([*differing, *([f"it lacks the programs {_short(lacking)}"] if lacking else [])])

    def refuse_pool(self, fitting: int) -> None:
        """Refuse a bundle whose pool is larger than the `fitting` tokens (per replica) that memory holds.

        Raises:
            BundleMismatch: always.
        """
        tokens = self.header["settings"]["kv_tokens"]
        self._refuse([f"its KV pool has {tokens} tokens, memory holds {fitting} (a higher --memory-fraction may help)"])

    def _refuse(self, differing: list[str]) -> None:
        if differing:
            raise BundleMismatch(
                f"--bundle {self.folder} was made for something else: {'; '.join(differing)}. Make one for what runs here, in a new folder"
                f" (this one: {self.header['command']}), or compile at the start with --bundle-mismatch compile"
            )


@dataclass(frozen=True)
class Loader:
    """Programs come from a bundle; they run on a mesh."""

    bundle: Bundle
    mesh: Mesh
    stage: str = "load"

    def start(self) -> None:
        """Do what must be done before programs are loaded: those with kernels for Hopper GPUs want their runtime in the process."""
        if self.bundle.mosaic:
            from pallas_kernels import hopper

            hopper.start_runtime()

    def begin(self, key: Any, call: Call) -> Callable[[], Made]:
        """Compare the arguments; the returned function loads.

        Raises:
            BundleMismatch: the program was compiled for other arguments.
        """
        entry = self.bundle.header["programs"][str(key)]
        if entry["inputs"] != digest(call.inputs):
            raise BundleMismatch(f"--bundle {self.bundle.folder}: {key} was compiled for other arguments; {REMEDY}")

        def loaded() -> Made:
            data = (self.bundle.folder / entry["file"]).read_bytes()
            return Made(load(data, entry, call.arguments, self.mesh), ProgramSize(*entry["size"]))

        return loaded


def open_bundle(folder: Path) -> Bundle:
    """Read a bundle and compare every byte of it with its manifest.

    Raises:
        ConfigError: it is not there, damaged, or of another version of this format.
    """
    if not (folder / HEADER).is_file():
        raise ConfigError(f"--bundle {folder}: no {HEADER} there; name a folder that `jaxinfer plan --bundle` has written")
    if not (folder / manifest.NAME).is_file():
        raise ConfigError(f"--bundle {folder}: {manifest.NAME} is missing, so nothing says whether the programs are whole; {REMEDY}")
    try:
        for programs in (False, True):
            manifest.verify(folder, weights=programs, remedy=REMEDY)
        header = read_json(folder / HEADER)
    except CheckpointError as error:
        raise ConfigError(f"--bundle: {error}") from None
    if header.get("version") != VERSION:
        raise ConfigError(f"--bundle {folder}: version {header.get('version')} of the format, this jaxinfer reads {VERSION}; {REMEDY}")
    return Bundle(folder, header)


def machine(device: Any) -> dict[str, Any]:
    """What programs depend on beside what they compute: versions, sources and the device (a described one will do)."""
    chip = devices.find_chip(device.device_kind)
    return {
        "sources of jaxinfer": _sources(), "jax": jax.__version__, "jaxlib": version("jaxlib"),
        "runtime": {name: found for name in RUNTIMES.get(device.platform, ()) if (found := _version(name)) is not None},
        "device": device.device_kind if chip is None else chip.name, "processor": platform.machine(),
        **{name: str(getattr(jax.config, name)) for name in FLAGS},
        **({"multiprocessors": device.core_count} if device.platform == "gpu" else {}),  # kernels whose blocks wait for each other
    }  # fmt: skip


def programs_for(config: ProgramConfig) -> dict[str, Any]:
    """What decides the programs themselves, by name."""
    pool, placement = config.pool, config.placement
    return {
        "model": _model(config.graph), "draft model": None if config.draft is None else _model(config.draft),
        "dtype": config.graph.dtype.name, "mesh": dict(placement.mesh.shape), "implementation": placement.implementation,
        "page size": pool.page_size, "pages": pool.pages, "kv codes": pool.codes, "sequences": config.max_sequences,
        "tokens of a sequence": config.max_tokens, "buckets": [str(bucket) for bucket in config.buckets],
    }  # fmt: skip


def cpu_features() -> list[str]:
    """Extensions of the instruction set that compiled code may use here; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    x86 = next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split()
    arm = next((line for line in lines if line.startswith("Features")), "").partition(":")[2].split()
    return sorted({flag for flag in x86 if flag.startswith(CODE)} | set(arm))


def digest(parts: Iterable[str]) -> str:
    """A hash of some texts in their order."""
    found = sha256()
    for part in parts:
        found.update(part.encode() + b"\0")
    return found.hexdigest()[:32]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _model(graph: Graph) -> str:
    name = graph.module.__name__.rpartition(".")[2]
    return f"{name} {digest([repr(graph.config), graph.dtype.name, *graph.names, *map(repr, graph.specs)])}"


def _sources() -> str:
    """A hash of the files that programs are made from."""
    own, kernels = Path(__file__).parents[1], Path(pallas_kernels.__file__).parent
    roots = [(own, [own / name for name in SOURCES]), (kernels, [kernels])]
    found = [
        (path.relative_to(folder).as_posix(), path)
        for folder, parts in roots for part in parts for path in ([part] if part.is_file() else sorted(part.rglob("*.py")))
        if path != Path(__file__)
    ]  # fmt: skip
    return digest(f"{name} {sha256(path.read_bytes()).hexdigest()}" for name, path in found)


def _differences(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {_short(recorded.get(name))} in the bundle, {_short(value)} here"
        for name, value in here.items() if recorded.get(name) != value
    ]  # fmt: skip


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."
