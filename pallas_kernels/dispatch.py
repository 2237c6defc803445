"""Chooses which file of an op's folder runs: `<op>/<implementation>.py`, found by name, imported when first used.

A caller names an implementation or says "auto". "auto" goes through the platform's preferences and takes the first that exists; the
choice is logged once. Whatever was asked for by name and is not there is an error: nothing falls back in silence. Knows no op by
name and looks at no array.
"""

import functools
import importlib
import logging
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")
PREFERENCES = {"cpu": ("xla",), "gpu": ("gpu", "xla"), "tpu": ("tpu", "xla")}

_logger = logging.getLogger("pallas_kernels.dispatch")


class Target(NamedTuple):
    """What programs are being traced for: the platform ("cpu", "gpu" or "tpu") and the device kind, as in "NVIDIA H200"."""

    platform: str
    device: str


def target() -> Target:
    """The chip named by `jax.sharding.use_abstract_mesh` (as when compiling for hardware that is not there), else jax's default device."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    found = jax.local_devices()[0] if described is None else described
    platform = "gpu" if found.platform in ("cuda", "rocm") else found.platform
    return Target(platform, found.device_kind)


def ops() -> tuple[str, ...]:
    """Names of the ops: the folders of this package that hold an api.py."""
    return tuple(sorted(file.parent.name for file in Path(__file__).parent.glob("*/api.py")))


def implementations(op: str) -> tuple[str, ...]:
    """The implementations that exist for an op, the reference first. Raises ValueError for an unknown op."""
    if op not in ops():
        raise ValueError(f"unknown op {op!r}: pallas_kernels has {', '.join(ops())}")
    folder = Path(__file__).parent / op
    return tuple(name for name in IMPLEMENTATIONS if (folder / f"{name}.py").exists())


def resolve(op: str, implementation: str, platform: str) -> ModuleType:
    """The module that implements op.

    implementation: "auto" or one of IMPLEMENTATIONS; platform: "cpu", "gpu" or "tpu".
    Raises ValueError for an unknown op or implementation and NotImplementedError for one that does not exist for this op.
    """
    return importlib.import_module(f"pallas_kernels.{op}.{choose(op, implementation, platform)}")


@functools.cache
def choose(op: str, implementation: str, platform: str) -> str:
    """The name that `resolve` imports; logged the first time "auto" decides for a platform. Raises as `resolve` does."""
    existing = implementations(op)
    if implementation == "auto":
        preferred = PREFERENCES.get(platform, ("xla",))
        choice = next((name for name in preferred if name in existing), None)
        if choice is None:
            raise NotImplementedError(f"{op} has no implementation for platform {platform!r}: wanted {preferred}, there are {existing}")
        missing = preferred[: preferred.index(choice)]
        note = f" ({op} has no {' or '.join(missing)} implementation yet)" if missing else ""
        _logger.info("%s runs its %r implementation on platform %r%s", op, choice, platform, note)
        return choice
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r} for {op}: use 'auto' or one of {', '.join(existing)}")
    if implementation not in existing:
        raise NotImplementedError(
            f"implementation={implementation!r} does not exist for {op}: there are {', '.join(existing)}; "
            "'auto' picks the one for the platform"
        )
    return implementation
