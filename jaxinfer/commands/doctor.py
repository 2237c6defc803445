"""`jaxinfer doctor`: does everything here work, and how fast is it? One line for each check: OK, WARN or FAIL, and how to mend it.

A check is a function that yields findings; one that raises becomes a FAIL, so that the others still run. Nothing is changed on the
machine but a probe file in the cache folder. Secrets never appear: variables are shown by name from a list, and texts are redacted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jaxinfer import config
from jaxinfer.console import redact

HELP = "check versions, devices, cache, port, speed and the embedded model"
PACKAGES = ("jaxinfer", "jax", "jaxlib", "flax", "numpy", "tokenizers", "orbax-checkpoint", "llguidance", "fastapi", "uvicorn")
JAX_FROM, JAX_BELOW = (0, 10), (0, 13)
SHOWN_VARIABLES = ("JAX_", "XLA_", "JAXINFER_", "HF_", "CUDA_VISIBLE", "TPU_", "LD_LIBRARY_PATH", "OMP_NUM")
NVIDIA_DRIVER, TPU_NODES = Path("/proc/driver/nvidia/version"), ("/dev/accel0", "/dev/vfio/0")
FIXES = {
    "devices": "check the driver, and that JAX_PLATFORMS names a platform that is there",
    "program": "check the driver, and that jax and jaxlib are of one version",
    "speed": "end other programs that hold the device's memory, then run the doctor again",
}
LARGE_CACHE = 10 << 30
SLOW = 0.6


class Status(StrEnum):
    """How a finding counts, from best to worst."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """What a check saw; `fix` says what to do about it unless all is well."""

    name: str
    status: Status
    detail: str
    fix: str = ""


Check = Callable[[argparse.Namespace], Iterator[Finding]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--port", type=int, default=config.ServerConfig.port, help="port that the server shall use [8000]")


def run(args: argparse.Namespace) -> int:
    """Run every check and print the findings; 1 if one is a FAIL."""
    checks: tuple[Check, ...] = (versions, environment, devices, program, speed, cache, port, embedded_model)
    findings = []
    for check in checks:
        for finding in _walled(check, args):
            findings.append(finding)
            if not args.json:
                _show(finding)
    worst = max((finding.status for finding in findings), key=list(Status).index)
    if args.json:
        print(json.dumps({"status": worst, "findings": [asdict(finding) for finding in findings]}, ensure_ascii=False))
    return int(worst is Status.FAIL)


def versions(_: argparse.Namespace) -> Iterator[Finding]:
    """Python and the packages that results depend on."""
    yield Finding("python", Status.OK, f"{platform.python_version()} on {platform.platform()}")
    found = {name: _version(name) for name in PACKAGES}
    missing = [name for name, number in found.items() if number is None]
    listed = ", ".join(f"{name} {number}" for name, number in found.items() if number is not None)
    if missing:
        yield Finding("packages", Status.FAIL, f"missing: {', '.join(missing)}; there: {listed}", "pip install --upgrade jaxinfer")
    elif not JAX_FROM <= tuple(int(part) for part in str(found["jax"]).split(".")[:2]) < JAX_BELOW:
        yield Finding("packages", Status.WARN, f"jax {found['jax']} is not one we test with", "pip install 'jax>=0.10,<0.13'")
    else:
        yield Finding("packages", Status.OK, listed)


def environment(_: argparse.Namespace) -> Iterator[Finding]:
    """Variables that change what jax, its compiler or the model hub do; shown, not obeyed."""
    shown = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SHOWN_VARIABLES)]
    yield Finding("environment", Status.OK, redact("  ".join(shown)) or "nothing set that matters")


def devices(_: argparse.Namespace) -> Iterator[Finding]:
    """What jax sees, and drivers that it does not use."""
    import jax

    from jaxinfer import devices as chips

    found = jax.devices()
    memory = chips.memory_bytes(found[0]) / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    host = f"; host: {cores} cores, {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    detail = f"{len(found)} x {chips.label(found[0])}, {memory:.1f} GiB for arrays on each{host}"
    driver = NVIDIA_DRIVER.read_text().splitlines()[0].strip() if NVIDIA_DRIVER.exists() else None
    if jax.default_backend() == "cpu" and driver is not None:
        yield Finding("devices", Status.WARN, f"{detail}; an NVIDIA driver is loaded, but jax uses the CPU", "pip install 'jaxinfer[cuda]'")
    elif jax.default_backend() == "cpu" and any(Path(node).exists() for node in TPU_NODES):
        yield Finding("devices", Status.WARN, f"{detail}; a TPU is there, but jax uses the CPU", "pip install 'jaxinfer[tpu]'")
    else:
        yield Finding("devices", Status.OK, detail + (f"; {driver}" if driver else ""))


def program(_: argparse.Namespace) -> Iterator[Finding]:
    """Compile and run something tiny and compare with numpy."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    x = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
    wrong = float(np.max(np.abs(jax.jit(lambda x: jnp.tanh(jax.lax.dot(x, x, precision="highest")))(x) - np.tanh(x @ x))))
    if wrong < 1e-4:
        yield Finding("compile and run", Status.OK, f"a small program is right to {wrong:.0e}")
    else:
        yield Finding("compile and run", Status.FAIL, f"a small program is off by {wrong:.1e}", "reinstall jax and jaxlib of one version")


def speed(_: argparse.Namespace) -> Iterator[Finding]:
    """Memory bandwidth and matmul rate, against the chip's peak where it is known."""
    import jax

    from jaxinfer import devices as chips
    from jaxinfer.bench import ceilings

    chip = chips.find_chip(jax.devices()[0].device_kind)
    measured = ceilings.measure("float32" if jax.default_backend() == "cpu" else "bfloat16")
    yield _against("memory bandwidth", measured.bandwidth, "GB/s", chip.bandwidth if chip else None)
    yield _against(f"matmul {measured.dtype}", measured.matmul, "GFLOP/s", chip.bf16_rate if chip else None)


def cache(_: argparse.Namespace) -> Iterator[Finding]:
    """The folder for compiled programs: writable, how large, room on its disk."""
    folder = config.cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fix = "set JAXINFER_CACHE_DIR to a folder that you may write to; until then every start compiles anew"
        yield Finding("cache", Status.WARN, f"{folder}: {error.strerror}", fix)
        return
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    detail = f"{folder} is writable, holds {size / 2**20:.0f} MiB, {free / 2**30:.1f} GiB free on its disk"
    if size > LARGE_CACHE or free < 1 << 30:
        yield Finding("cache", Status.WARN, detail, f"delete {folder}; it fills again as programs are compiled")
    else:
        yield Finding("cache", Status.OK, detail)


def port(args: argparse.Namespace) -> Iterator[Finding]:
    """Whether the server could listen."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.ServerConfig.host, args.port))
        except OSError as error:
            fix = "start the server with another --port, or end what uses this one"
            yield Finding("port", Status.WARN, f"{args.port}: {error.strerror}", fix)
        else:
            yield Finding("port", Status.OK, f"{args.port} is free")


def embedded_model(_: argparse.Namespace) -> Iterator[Finding]:
    """Read the whole demo model, strictly."""
    import jax

    from jaxinfer.checkpoint import hub, read
    from jaxinfer.models import find
    from jaxinfer.models.graph import Graph
    from jaxinfer.sharding import DEFAULT_RULES, make_mesh
    from jaxinfer.tokenizer import Tokenizer

    folder = hub.resolve("demo")
    values = read.read_config(folder)
    module = find.find(values.get("model_type"))
    graph = Graph.of(module, module.Config.from_hf(values), "float32")
    mesh = make_mesh({"data": 1, "tensor": 1}, jax.devices()[:1])
    count = sum(array.size for array in graph.leaves(read.load(folder, graph, mesh, DEFAULT_RULES)))
    vocabulary = Tokenizer.load(folder).vocab_size
    yield Finding("embedded model", Status.OK, f"{folder.name}: {count / 1e6:.1f} M parameters read, {vocabulary} tokens in the vocabulary")


def _walled(check: Check, args: argparse.Namespace) -> Iterator[Finding]:
    try:
        yield from check(args)
    except Exception as error:
        text = redact(f"{type(error).__name__}: {error}".splitlines()[0])
        name = check.__name__.replace("_", " ")
        yield Finding(name, Status.FAIL, text, FIXES.get(check.__name__, "reinstall: pip install --force-reinstall jaxinfer"))


def _against(name: str, measured: float, unit: str, peak: float | None) -> Finding:
    text = f"{measured / 1e9:,.0f} {unit}"
    if peak is None:
        return Finding(name, Status.OK, text)
    share = measured / peak
    text += f", {share:.0%} of the chip's {peak / 1e9:,.0f}"
    if share < SLOW:
        return Finding(name, Status.WARN, text, "end other programs on this device; look at its clocks, power limit and temperature")
    return Finding(name, Status.OK, text)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _show(finding: Finding) -> None:
    from rich.console import Console
    from rich.text import Text

    colour = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}[finding.status]
    line = Text.assemble((f"{finding.status:4}", colour), f"  {finding.name:17} {finding.detail}")
    if finding.fix:
        line.append(f"\n      -> {finding.fix}", "cyan")
    Console().print(line, soft_wrap=True, highlight=False)
