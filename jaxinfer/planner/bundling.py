"""Writes bundles: the whole list of programs of a choice, compiled for the pool that an engine would make, in a folder.

The pool is sized by what the compiler says, as at an engine's start, and recorded: programs are compiled for one number of pages. XLA's
choices of GPU kernels come from a card: a file that XLA has written there (`--autotune`) is used for every program and kept in the
folder. What is in a bundle and how it is read says step/bundle.py.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxinfer.checkpoint import atomic, manifest
from jaxinfer.config import ConfigError, EngineConfig
from jaxinfer.planner.memory import check_programs
from jaxinfer.planner.sizing import Sizing, widths
from jaxinfer.step import bundle
from jaxinfer.step.executable import Compiler, dump
from jaxinfer.step.program import Program

SETTINGS = (
    "dtype", "quantize", "max_model_len", "page_size", "kv_tokens", "kv_dtype", "max_sequences", "max_step_tokens", "mesh",
    "implementation", "deterministic", "speculate", "draft_model", "draft_tokens",
)  # fmt: skip
AUTOTUNE = "autotune"
COMPLETE = "xla_gpu_require_complete_aot_autotune_results"
ONE_KERNEL = re.compile(r"^NOT_FOUND: No cached config found for HLO instr: %((?:input|loop)_[\w.]+) = ")  # XLA's words when one is missing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """A bundle that is wanted: where, XLA's choices from a card or None, and what is said about it (model, slice, command)."""

    folder: Path
    autotune: Path | None
    about: Mapping[str, str]


@dataclass(frozen=True)
class Choosing(Compiler):
    """Programs are compiled with XLA's choices from a file, all of which must be there. A card makes none for a fusion that has one kernel
    alone; where nothing but one such loop or reduction is missing from a program, XLA takes that kernel."""

    def _with_options(self, lowered: Any, options: dict[str, str | bool]) -> Any:
        try:
            return lowered.compile(options)
        except jax.errors.JaxRuntimeError as error:
            found = ONE_KERNEL.search(str(error))
            if found is None:
                raise ConfigError(
                    "the file of --autotune does not have XLA's choices for these programs: it was made for other settings, another version"
                    f" or another card; make it anew with a bundle of these settings. XLA says: {str(error)[:600]}"
                ) from None
            logger.info("XLA's choices: none for %s, which has one kernel alone", found[1])
        return lowered.compile(options | {COMPLETE: False})


def compiler(autotune: str | None, platform: str) -> Compiler:
    """The compiler, with XLA's choices from a file: all of them, or compiling is refused.

    Raises:
        ConfigError: there is no such file, or the slice has no GPUs.
    """
    if autotune is None:
        return Compiler()
    if platform != "gpu":
        raise ConfigError("--autotune is for slices of GPUs: XLA makes no such choices elsewhere; leave it out")
    if not Path(autotune).is_file():
        raise ConfigError(f"--autotune {autotune}: no such file; see `jaxinfer plan --help` for how a card writes it")
    whole = str(Path(autotune).resolve())
    return Choosing({"xla_gpu_load_autotune_results_from": whole, COMPLETE: True})


def complete(sizing: Sizing, made: Program, needed: int, source: Compiler, progress: Callable[[str, int, int], None]) -> Program:
    """Every program for the pool that an engine makes beside programs that need `needed` bytes, of `made` if those are the same.

    Raises:
        ConfigError: it does not fit after all.
    """
    memory, program = sizing.resized(needed, source)
    program = made if (made.source, made.config.pool) == (source, program.config.pool) else program
    program.compile(progress, [key for key in program.config.keys if key not in program.sizes])
    check_programs(memory, program.bytes_beside, sizing.config.cache)
    return program


def write(order: Order, sizing: Sizing, program: Program) -> dict[str, Any]:
    """Write a bundle of compiled programs; what a plan says of it.

    Raises:
        CheckpointError: the place is taken or cannot be written to. NotImplementedError: a program that cannot be kept.
    """
    with atomic.new_folder(order.folder, flag="--bundle") as folder:
        (folder / "programs").mkdir()
        entries = {str(key): _program(folder, program, key) for key in program.config.keys}
        header = {
            "version": bundle.VERSION, **order.about, "machine": bundle.machine(_device(program)),
            "cpu_features": bundle.cpu_features() if sizing.machine.platform == "cpu" else [],
            "devices": program.config.placement.mesh.size, "programs_for": bundle.programs_for(program.config),
            "settings": _settings(sizing.config, sizing.machine.platform, program), "bytes_beside": program.bytes_beside,
            "autotune": order.autotune and f"{AUTOTUNE}/{order.autotune.name}", "programs": entries,
        }  # fmt: skip
        (folder / bundle.HEADER).write_text(_readable(header), encoding="utf-8")
        if order.autotune is not None:
            (folder / AUTOTUNE).mkdir()
            shutil.copyfile(order.autotune, folder / AUTOTUNE / order.autotune.name)
        manifest.write(folder)
    size = sum(entry["bytes"] for entry in entries.values())
    return {"folder": str(order.folder), "programs": len(entries), "bytes": size, "kv_tokens": header["settings"]["kv_tokens"]}


def _program(folder: Path, program: Program, key: Any) -> dict[str, Any]:
    compiled, size = program.compiled(key), program.sizes[key]
    data, description = dump(compiled)
    name = f"programs/{key}.xla"
    (folder / name).write_bytes(data)
    return {
        "file": name, "bytes": len(data), "inputs": bundle.digest(program.call(key).inputs),
        "size": [size.temporary, size.output, size.code], "seconds": round(program.compile_seconds[str(key)], 3),
        "mosaic": _device(program).platform == "gpu" and "mosaic_gpu" in compiled.as_text(), **description,
    }  # fmt: skip


def _readable(header: Mapping[str, Any]) -> str:
    """JSON with a line for each field, and one for each program."""
    fields = {name: json.dumps(value) for name, value in header.items() if name != "programs"}
    programs = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in header["programs"].items())
    return "{\n" + "".join(f" {json.dumps(name)}: {text},\n" for name, text in fields.items()) + f' "programs": {{\n{programs}\n }}\n}}\n'


def _device(program: Program) -> Any:
    return program.config.placement.mesh.devices.flat[0]


def _settings(config: EngineConfig, platform: str, program: Program) -> dict[str, Any]:
    """The settings that decide the programs, as an engine must have them; what `auto` and defaults meant is said in full."""
    made, pool = program.config, program.config.pool
    given = {name: getattr(section, name) for section in vars(config).values() for name in vars(section)}
    meant = {
        "dtype": made.graph.dtype.name, "max_model_len": made.max_tokens, "page_size": pool.page_size,
        "kv_tokens": (pool.pages - 1) * pool.page_size, "max_sequences": made.max_sequences,
        "max_step_tokens": widths(config, platform).tokens,
    }  # fmt: skip
    draft = given["draft_model"]
    if draft is not None and Path(draft).expanduser().is_dir():
        meant["draft_model"] = str(Path(draft).expanduser().resolve())
    return {name: meant.get(name, given[name]) for name in SETTINGS}
