"""Chooses which file of an op's folder runs: `<op>/<implementation>.py`, found by name, imported when first used.

A caller names an implementation or says "auto". "auto" goes through the platform's preferences and takes the first that exists and does
not refuse; the choice is logged once, with the reason where one refused. An implementation refuses through a function of its module,
`refusal(target, key) -> str | None`: a reason, for what the key tells of shapes and dtypes. `by_name(key)`, likewise, makes "auto" alone
pass it over. Whatever was asked for by name and is not there or refuses is an error: nothing falls back in silence. Knows no op by name
and looks at no array.
"""

import functools
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")
PREFERENCES = {"cpu": ("xla",), "gpu": ("gpu", "xla"), "tpu": ("tpu", "xla")}

Key = dict[str, int | str]

_logger = logging.getLogger("pallas_kernels.dispatch")


class Target(NamedTuple):
    """What programs are being traced for: the platform ("cpu", "gpu" or "tpu") and the device kind, as in "NVIDIA H200"."""

    platform: str
    device: str


_assumed: ContextVar[Target | None] = ContextVar("pallas_kernels_assumed_target", default=None)


@contextmanager
def assumed(target: Target) -> Iterator[None]:
    """Inside, ops are traced as for this target, with no mesh: to look at what would be run there, not to run or compile it."""
    token = _assumed.set(target)
    try:
        yield
    finally:
        _assumed.reset(token)


def target() -> Target:
    """The chip named by `jax.sharding.use_abstract_mesh` (as when compiling for hardware that is not there), else jax's default device."""
    given = _assumed.get()
    if given is not None:
        return given
    described = jax.sharding.get_abstract_mesh().abstract_device
    found = jax.local_devices()[0] if described is None else described
    platform = "gpu" if found.platform in ("cuda", "rocm") else found.platform
    return Target(platform, found.device_kind)


def ops() -> tuple[str, ...]:
    """Names of the ops: the folders of this package that hold an api.py."""
    return tuple(sorted(file.parent.name for file in Path(__file__).parent.glob("*/api.py")))


@functools.cache
def implementations(op: str) -> tuple[str, ...]:
    """The implementations that exist for an op, the reference first. Raises ValueError for an unknown op."""
    if op not in ops():
        raise ValueError(f"unknown op {op!r}: pallas_kernels has {', '.join(ops())}")
    folder = Path(__file__).parent / op
    return tuple(name for name in IMPLEMENTATIONS if (folder / f"{name}.py").exists())


def resolve(op: str, implementation: str, target: Target, key: Key | None = None) -> ModuleType:
    """The module that implements op.

    implementation: "auto" or one of IMPLEMENTATIONS; key: what is known of the shapes and dtypes, for `refusal`.
    Raises ValueError for an unknown op or implementation and NotImplementedError for one that does not exist for this op or refuses.
    """
    return _module(op, choose(op, implementation, target, key))


def refusal(op: str, implementation: str, target: Target, key: Key | None = None) -> str | None:
    """Why an existing implementation cannot run for a target and key; None when it can."""
    ask = getattr(_module(op, implementation), "refusal", None)
    return None if ask is None else ask(target, key or {})


def by_name(op: str, implementation: str, key: Key | None = None) -> str | None:
    """Why "auto" passes an existing implementation over for a key, though it may be asked for by name; None when it does not."""
    ask = getattr(_module(op, implementation), "by_name", None)
    return None if ask is None else ask(key or {})


def choose(op: str, implementation: str, target: Target, key: Key | None = None) -> str:
    """The name that `resolve` imports; what "auto" decides, and why it passes something over, is logged once. Raises as `resolve` does."""
    existing = implementations(op)
    if implementation == "auto":
        return _preferred(op, existing, target, key)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {implementation!r} for {op}: use 'auto' or one of {', '.join(existing)}")
    if implementation not in existing:
        raise NotImplementedError(
            f"implementation={implementation!r} does not exist for {op}: there are {', '.join(existing)}; "
            "'auto' picks the one for the platform"
        )
    reason = refusal(op, implementation, target, key)
    if reason is not None:
        raise NotImplementedError(f"{op} cannot run implementation={implementation!r}: {reason}; 'auto' picks one that can")
    return implementation


def _preferred(op: str, existing: tuple[str, ...], target: Target, key: Key | None) -> str:
    """The first of the platform's preferences that exists and does not refuse."""
    preferred, missing, refused = PREFERENCES.get(target.platform, ("xla",)), [], []
    for name in preferred:
        if name not in existing:
            missing.append(name)
            continue
        wants_name = by_name(op, name, key)
        reason = wants_name or refusal(op, name, target, key)
        if reason is None:
            note = f" ({op} has no {' or '.join(missing)} implementation yet)" if missing else ""
            for level, each in refused:
                _log_once(level, f"{op} runs its {name!r} implementation on platform {target.platform!r} instead of {each}")
            if not refused:
                _log_once(logging.INFO, f"{op} runs its {name!r} implementation on platform {target.platform!r}{note}")
            return name
        refused.append((logging.INFO if wants_name else logging.WARNING, f"{name!r}: {reason}"))
    raise NotImplementedError(
        f"{op} has no implementation for platform {target.platform!r}: wanted {preferred}, there are {existing}"
        + "".join(f"; {each}" for _, each in refused)
    )


@functools.cache
def _log_once(level: int, message: str) -> None:
    _logger.log(level, message)


def _module(op: str, name: str) -> ModuleType:
    return importlib.import_module(f"pallas_kernels.{op}.{name}")
