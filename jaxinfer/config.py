"""Every setting of the project, as frozen dataclasses that check themselves; the command line is derived from them.

A field's `help` is its documentation, its flag is its name with dashes (`max_model_len` -> `--max-model-len`), its parser follows
from its type. The environment is read in this file alone: `JAXINFER_LOG` (log level), `JAXINFER_CACHE_DIR` (compiled programs,
tuned sizes) and `JAXINFER_API_KEY` (twin of `--api-key`, so that a key need not stand in a process list).
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "random")
KV_DTYPES = ("auto", "int8", "fp8")
IMPLEMENTATIONS = ("auto", "xla", "gpu", "tpu", "reference")
SWITCH = ("on", "off")
BUNDLE_MISMATCH = ("refuse", "compile")
SPECULATE = ("off", "lookup", "draft", "eagle", "auto")
MOST_DRAFTS = 7  # attention takes up to 8 tokens of a decode row
DRAFTS = 4  # where each costs a pass through a smaller model
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class MeshShape(NamedTuple):
    """Devices along each mesh axis: `data` replicas of the batch, `tensor` shards of weights and KV heads."""

    data: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.data * self.tensor


class ConfigError(ValueError):
    """A setting that cannot work; the message says what, why and what to do."""


def cache_dir() -> Path:
    """Where compiled programs and tuned sizes are kept: `JAXINFER_CACHE_DIR`, by default `~/.cache/jaxinfer`."""
    return Path(os.environ.get("JAXINFER_CACHE_DIR") or Path.home() / ".cache" / "jaxinfer")


def log_level() -> str:
    """The log level: `JAXINFER_LOG`, by default INFO.

    Raises:
        ConfigError: it is none of `LOG_LEVELS`.
    """
    level = os.environ.get("JAXINFER_LOG", "INFO").upper()
    if level not in LOG_LEVELS:
        raise ConfigError(f"JAXINFER_LOG={level} is not one of {', '.join(LOG_LEVELS)}")
    return level


def parse_count(text: str) -> int:
    """Read 4096, 4k (4096) or 1M (1048576).

    Raises:
        ConfigError: anything else.
    """
    scale = {"k": 1 << 10, "m": 1 << 20}.get(text[-1:].lower(), 1)
    digits = text[:-1] if scale > 1 else text
    if not digits.isascii() or not digits.isdigit():
        raise ConfigError(f"{text!r} is not a count; write for example 4096, 4k or 1M")
    return int(digits) * scale


def parse_mesh(text: str) -> MeshShape:
    """Read `data=2,tensor=4`; axes not named have size 1.

    Raises:
        ConfigError: an unknown axis or a size below 1.
    """
    sizes = MeshShape()._asdict()
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis.strip() not in sizes or not (size.isascii() and size.strip().isdigit()) or int(size) < 1:
            raise ConfigError(f"--mesh {text!r}: write AXIS=SIZE with axes {', '.join(MeshShape._fields)}, for example data=2,tensor=4")
        sizes[axis.strip()] = int(size)
    return MeshShape(**sizes)


def parse_audit_budget(text: str) -> float:
    """Read `kl=0.02`: the largest mean KL divergence, in nats per token, that a recorded audit may have.

    Raises:
        ConfigError: anything else.
    """
    name, _, value = text.partition("=")
    try:
        bound = float(value) if name.strip() == "kl" else math.nan
    except ValueError:
        bound = math.nan
    if not 0 <= bound < math.inf:
        raise ConfigError(f"--require-audit {text!r}: write kl=NATS, for example kl=0.02")
    return bound


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), parse: Callable[[str], Any] | None = None) -> Any:
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices, "parse": parse})


def _one_of(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"--{flag} {value!r} is not one of {', '.join(choices)}")


def _at_least(flag: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise ConfigError(f"--{flag} {value} is below {low}")


@dataclass(frozen=True)
class ModelConfig:
    """Which model runs, and in which numbers."""

    model: str = option("demo", "folder, Hugging Face repository, 'demo' (the embedded model), or with --load-format random a known shape")
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face repository")
    dtype: str = option("auto", "weights and activations; auto is bfloat16 on accelerators, float32 on CPUs", choices=DTYPES)
    quantize: str | None = option(None, "quantise the weights at load: a scheme, and exceptions by name, as in int8,lm_head=keep")
    load_format: str = option("auto", "auto reads the weights; random makes them up (benchmarks)", choices=LOAD_FORMATS)
    max_model_len: int | None = option(None, "longest prompt plus output, in tokens (default: the model's own)", parse=parse_count)
    require_audit: str | None = option(None, "refuse quantised numbers without a recorded audit within kl=NATS, as in kl=0.02")

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("load-format", self.load_format, LOAD_FORMATS)
        _at_least("max-model-len", self.max_model_len, 2)
        if self.require_audit is not None:
            parse_audit_budget(self.require_audit)


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV cache."""

    page_size: int | None = option(None, "tokens in one KV page (default: 32 on CPUs, 64 on accelerators)")
    memory_fraction: float = option(0.9, "share of the device's memory that weights, programs and KV pages may take")
    kv_tokens: int | None = option(None, "tokens in the KV pool, per data replica (default: what the memory holds)", parse=parse_count)
    kv_dtype: str = option("auto", "numbers in the KV cache; int8 and fp8 about double its tokens; auto: as activations", choices=KV_DTYPES)
    prefix_caching: str = option("on", "share the KV pages of common beginnings", choices=SWITCH)

    def __post_init__(self) -> None:
        _one_of("kv-dtype", self.kv_dtype, KV_DTYPES)
        _one_of("prefix-caching", self.prefix_caching, SWITCH)
        if self.page_size is not None and (self.page_size < 1 or self.page_size & (self.page_size - 1)):
            raise ConfigError(f"--page-size {self.page_size} is not a power of two; write for example 32 or 64")
        if not 0.0 < self.memory_fraction <= 1.0:
            raise ConfigError(f"--memory-fraction {self.memory_fraction:g} is not in (0, 1]")
        _at_least("kv-tokens", self.kv_tokens, 2 * (self.page_size or 32))


@dataclass(frozen=True)
class SchedulerConfig:
    """How requests share a step."""

    max_sequences: int | None = option(None, "sequences that run at once, per data replica (default: 64 on CPUs, 256 on accelerators)")
    max_step_tokens: int | None = option(
        None, "prompt tokens per step and data replica (default: 512 on CPUs, 2048 on accelerators)", parse=parse_count
    )
    max_waiting: int = option(4096, "requests that may wait; more are refused")
    policy: str = option("fcfs", "order in which waiting requests are admitted: fcfs, longest_prefix, priority or shortest")

    def __post_init__(self) -> None:
        _at_least("max-sequences", self.max_sequences, 1)
        _at_least("max-step-tokens", self.max_step_tokens, 16)
        _at_least("max-waiting", self.max_waiting, 1)


@dataclass(frozen=True)
class ExecutionConfig:
    """Where and how programs run."""

    mesh: MeshShape = option(MeshShape(), "device mesh, for example data=2,tensor=4", parse=parse_mesh)
    implementation: str = option("auto", "attention and matmul kernels", choices=IMPLEMENTATIONS)
    overlap: str = option("on", "schedule and launch a step before the tokens of the one before are on the host", choices=SWITCH)
    deterministic: str = option(
        "off", "compute every step in one fixed shape, so that a request's numbers are the same whatever else runs (slower)", choices=SWITCH
    )
    compile_threads: int = option(0, "programs compiled at once (default: one per core)")
    compilation_cache: str = option("on", "keep compiled programs between starts", choices=SWITCH)
    bundle: str | None = option(None, "folder of compiled programs: `jaxinfer plan` writes it, engines load it instead of compiling")
    bundle_mismatch: str = option("refuse", "what to do with a bundle that was made for something else", choices=BUNDLE_MISMATCH)

    def __post_init__(self) -> None:
        if min(self.mesh) < 1:
            raise ConfigError(f"mesh {self.mesh}: every size must be at least 1")
        _one_of("implementation", self.implementation, IMPLEMENTATIONS)
        _one_of("overlap", self.overlap, SWITCH)
        _one_of("deterministic", self.deterministic, SWITCH)
        _one_of("compilation-cache", self.compilation_cache, SWITCH)
        _one_of("bundle-mismatch", self.bundle_mismatch, BUNDLE_MISMATCH)
        _at_least("compile-threads", self.compile_threads, 0)


@dataclass(frozen=True)
class SpeculationConfig:
    """Several tokens in a step: drafts that the model verifies. The tokens are the same as without."""

    speculate: str = option(
        "off",
        "drafts from the text itself (lookup), a smaller model (draft), an EAGLE-3 head (eagle), or whichever is better (auto); only while"
        " they pay",
        choices=SPECULATE,
    )  # fmt: skip
    draft_model: str | None = option(
        None, "smaller model of the same tokenizer, or the model's EAGLE-3 head: folder or repository (default: the embedded model's own)"
    )  # fmt: skip
    draft_tokens: int | None = option(
        None, f"drafts of a sequence in one step, at most {MOST_DRAFTS} ({MOST_DRAFTS} for lookup, which costs little, else {DRAFTS})"
    )

    def __post_init__(self) -> None:
        _one_of("speculate", self.speculate, SPECULATE)
        _at_least("draft-tokens", self.draft_tokens, 1)
        if self.drafts > MOST_DRAFTS:
            raise ConfigError(f"--draft-tokens {self.draft_tokens} is above {MOST_DRAFTS}, which the attention kernels take")
        if self.draft_model is not None and self.speculate in ("off", "lookup"):
            raise ConfigError(f"--draft-model has no part in --speculate {self.speculate}; use draft, eagle or auto, or leave it out")

    @property
    def drafts(self) -> int:
        """Drafts of a sequence in one step, at most."""
        return self.draft_tokens or (MOST_DRAFTS if self.speculate == "lookup" else DRAFTS)


@dataclass(frozen=True)
class EngineConfig:
    """Everything that an engine is built from."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    execution: ExecutionConfig = ExecutionConfig()
    speculation: SpeculationConfig = SpeculationConfig()

    def __post_init__(self) -> None:
        if self.speculation.speculate != "off" and self.execution.deterministic == "on":
            raise ConfigError("--speculate and --deterministic exclude each other: drafts need steps of another shape; leave one out")


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP server."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on")
    api_key: str | None = option(None, "key that clients must send as a bearer token (twin: JAXINFER_API_KEY)")
    served_model_name: str | None = option(None, "name under which clients ask for the model (default: the model's)")
    drain_seconds: float = option(30.0, "how long open requests may run on after SIGTERM")
    shadow_check: float = option(0.0, "share of finished greedy requests to run again without drafts when idle, compared and counted")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} is not in 0..65535")
        if not 0.0 <= self.shadow_check <= 1.0:
            raise ConfigError(f"--shadow-check {self.shadow_check:g} is not in [0, 1]; 0.01 checks one request in a hundred")
        if self.api_key is None and os.environ.get("JAXINFER_API_KEY"):
            object.__setattr__(self, "api_key", os.environ["JAXINFER_API_KEY"])


def engine_settings() -> dict[str, Field[Any]]:
    """Every setting of an engine by its name."""
    return {item.name: item for section in _SECTIONS for item in fields(section)}


def add_arguments(parser: argparse.ArgumentParser, config: type) -> None:
    """Add one flag for each field of a settings dataclass; for a dataclass of dataclasses, of each in its own group."""
    group = parser.add_argument_group(config.__name__, (config.__doc__ or "").splitlines()[0])
    for item in fields(config):
        if isinstance(item.default, tuple(_SECTIONS)):
            add_arguments(parser, type(item.default))
        elif "help" in item.metadata:
            group.add_argument("--" + item.name.replace("_", "-"), default=argparse.SUPPRESS, **_argument(item))


def from_arguments(config: type, values: Mapping[str, Any]) -> Any:
    """Build a settings dataclass (nested ones too) from parsed flags; what was not given keeps its default.

    Raises:
        ConfigError: a value that the dataclass refuses.
    """
    given: dict[str, Any] = {}
    for item in fields(config):
        if isinstance(item.default, tuple(_SECTIONS)):
            given[item.name] = from_arguments(type(item.default), values)
        elif item.name in values:
            given[item.name] = values[item.name]
    return config(**given)


def _argument(item: Field[Any]) -> dict[str, Any]:
    default = "" if item.default is None or item.default is MISSING or item.metadata["parse"] is parse_mesh else f" [{item.default}]"
    keywords: dict[str, Any] = {"help": (item.metadata["help"] + default).replace("%", "%%"), "dest": item.name}
    if item.metadata["choices"]:
        alone = {"nargs": "?", "const": "on"} if item.metadata["choices"] == SWITCH else {}  # --deterministic means --deterministic on
        return {**keywords, "choices": item.metadata["choices"], **alone}
    plain = {"int": int, "float": float}.get(str(item.type).removesuffix(" | None"), str)
    return {**keywords, "type": _reported(item.metadata["parse"] or plain), "metavar": item.name.upper()}


def _reported(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """argparse shows the text of ArgumentTypeError alone, not that of other errors."""

    def parser(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    parser.__name__ = getattr(parse, "__name__", "value")
    return parser


_SECTIONS = (ModelConfig, CacheConfig, SchedulerConfig, ExecutionConfig, SpeculationConfig)
