"""What a child found out becomes a `Plan`: plain numbers and words. This file reads estimates and compiled sizes and computes neither."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxinfer.config import MeshShape
from jaxinfer.planner import advice, collectives, topology
from jaxinfer.planner.estimate import Estimate
from jaxinfer.planner.outcome import Plan
from jaxinfer.planner.predict import Kernels, Phase
from jaxinfer.step.program import Program
from jaxinfer.step.sizes import ProgramSize

SLOW_NOTE = "attention is XLA's, which is several times slower than the kernels of this platform: {}"
GUESS_NOTE = "programs were not compiled: their memory is a guess"
KV_NOTE = "how fast attention reads quantised keys and values was measured on an H200 alone; elsewhere it is assumed"
DRAFT_NOTE = "times are of steps without drafts; how often drafts stand is not predicted (python -m jaxinfer bench speculation measures it)"
HEAD_NOTE = "the EAGLE-3 head is made up, of the shape that one would train for the model: name a real one in place of HEAD"
HOPELESS_NOTE = "weights and one sequence are more than the memory, so nothing was compiled"
PLANNED = ("model", "mesh", "max_model_len", "max_sequences")  # settings that a plan says itself


@dataclass(frozen=True)
class Compiled:
    """What compiling for a choice told: program sizes by key, texts' collectives by key, seconds."""

    program: Program
    collectives: Mapping[Any, tuple[collectives.Collective, ...]]
    seconds: float

    @property
    def needed(self) -> int:
        """Bytes that the whole list of programs needs on a device."""
        return self.program.bytes_beside


@dataclass(frozen=True)
class Told:
    """Everything that a plan is told from: the request, the meshes weighed (best first), what was compiled, and changes."""

    request: Mapping[str, Any]
    weighed: list[Estimate]
    compiled: Mapping[MeshShape, Compiled]
    kernels: Kernels
    changes: list[advice.Change]

    @property
    def best(self) -> Estimate:
        """The mesh that was chosen."""
        return self.weighed[0]

    @property
    def own(self) -> Compiled | None:
        """What was compiled for it."""
        return self.compiled.get(self.best.choice.mesh)


def tell(told: Told) -> Plan:
    """The plan."""
    best, own = told.best, told.own
    changes = advice.next_steps(best, told.changes) if best.fits else advice.remedies(best, told.changes)
    model = told.request["model"]
    return Plan(
        model=model, target=_target(best), settings=_settings(told), fits=best.fits, memory=_memory(best, own), capacity=_capacity(best),
        phases={"decode": _phase(best.decode), "prefill": _phase(best.prefill)}, speed=_speed(best),
        meshes=[_mesh(each, each.choice.mesh in told.compiled) for each in told.weighed], programs=_programs(own),
        advice=[_advice(change, best, model) for change in changes], notes=[*_notes(told), *best.predictor.sources],
        command=_command(told.request, best),
    )  # fmt: skip


def name_of(mesh: MeshShape) -> str:
    """A mesh as its flag is written."""
    return f"data={mesh.data},tensor={mesh.tensor}"


def _notes(told: Told) -> list[str]:
    best, own, reason = told.best, told.own, told.kernels.passed_over
    quantised = best.choice.wish.config.cache.kv_dtype != "auto"
    drafts = best.choice.wish.config.speculation.speculate != "off"
    hopeless = own is None and best.hopeless
    return [
        *([HOPELESS_NOTE] if hopeless else []), *([] if own else [GUESS_NOTE]), *([KV_NOTE] if quantised else []),
        *([DRAFT_NOTE] if drafts else []), *([HEAD_NOTE] if best.choice.wish.needs_head else []),
        *([SLOW_NOTE.format(reason)] if reason else []),
    ]  # fmt: skip


def _target(best: Estimate) -> dict[str, Any]:
    piece, chip = best.choice.piece, topology.chip_of(best.choice.piece)
    return {
        "slice": piece.name, "topology": piece.topology, "chip": chip.name, "chips": piece.chips, "devices": piece.devices,
        "device_memory": best.choice.usable_memory, "chip_memory": chip.memory, "jax": jax.__version__,
    }  # fmt: skip


def _settings(told: Told) -> dict[str, Any]:
    best, kernels = told.best, told.kernels
    wish = best.choice.wish
    return {
        "mesh": name_of(best.choice.mesh), "context": wish.context, "output": wish.output, "concurrency": wish.concurrency,
        "goal": wish.goal, "price": wish.price, "weights": kernels.weights, "attention": kernels.attention, "matmul": kernels.matmul,
        "memory_fraction": wish.config.cache.memory_fraction, "page_size": best.page_size,
    }  # fmt: skip


def _memory(best: Estimate, own: Compiled | None) -> dict[str, Any]:
    account = best.account
    pages = max(0, account.pages(best.reserved))
    kv = (pages + 1) * account.page
    parts = own.program.beside if own else None
    return {
        "limit": account.limit, "weights": account.weights, "slots": account.slots, "programs": best.programs,
        "programs_from": "compiler" if own else "guess",
        "programs_temporary": parts.forward + parts.others if parts else None,
        "programs_outputs": parts.outputs + parts.held if parts else None,
        "programs_code": parts.code if parts else None, "kv_pool": kv, "kv_token": account.page / best.page_size,
        "total": account.weights + account.slots + best.programs + kv, "lacking": max(0, best.lacking),
    }  # fmt: skip


def _capacity(best: Estimate) -> dict[str, Any]:
    return {"kv_tokens": best.kv_tokens, "concurrency": best.concurrency, "largest_concurrency": best.largest, "running": best.running}


def _speed(best: Estimate) -> dict[str, Any]:
    return {
        "step": best.decode.seconds, "itl": best.decode.seconds, "itl_loaded": best.itl_loaded, "ttft": best.ttft,
        "tokens_per_second": best.tokens_per_second, "cost_per_million": best.cost,
    }  # fmt: skip


def _phase(phase: Phase) -> dict[str, Any]:
    return {**phase._asdict(), "bound": phase.bound, "utilisation": phase.utilisation}


def _mesh(each: Estimate, compiled: bool) -> dict[str, Any]:
    return {
        "mesh": name_of(each.choice.mesh), "fits": each.fits, "compiled": compiled, "weights": each.account.weights,
        "lacking": max(0, each.lacking), **_capacity(each), **_speed(each), "communication": each.decode.communication,
    }  # fmt: skip


def _programs(own: Compiled | None) -> dict[str, Any]:
    if own is None:
        return {"compiled": [], "derived": 0, "seconds": 0.0}

    def row(key: Any, size: ProgramSize) -> dict[str, Any]:
        return {
            "name": str(key), "temporary": size.temporary, "output": size.output, "code": size.code,
            "seconds": own.program.compile_seconds[str(key)],
            "collectives": [vars(each) for each in own.collectives.get(key, ())],
        }  # fmt: skip

    rows = [row(key, size) for key, size in own.program.sizes.items()]
    return {"compiled": rows, "derived": len(own.program.config.keys) - len(rows), "seconds": own.seconds}


def _advice(change: advice.Change, best: Estimate, model: str) -> dict[str, Any]:
    return {
        "change": change.words, "flags": change.flags, "effect": change.effect(best), "remark": change.remark.replace("MODEL", model),
        "fits": change.made.fits, "concurrency": change.made.largest, "itl": change.made.decode.seconds,
    }  # fmt: skip


def bundle_command(request: Mapping[str, Any], plan: Plan) -> str:
    """How to make the bundle of a plan once more."""
    settings, given = plan.settings, {"model": request["model"], **request["config"]}
    flags = [f"--slice {request['slice']}", f"--mesh {settings['mesh']}", f"--context {settings['context']}"]
    flags += [] if settings["concurrency"] is None else [f"--concurrency {settings['concurrency']}"]
    return " ".join(["python -m jaxinfer plan", *flags, *flags_of(given), "--bundle DIR"])


def flags_of(given: Mapping[str, Any], without: Collection[str] = ()) -> list[str]:
    """Settings as flags that a shell can read, all but some."""
    said = {name: value for name, value in given.items() if value is not None and name not in without}
    return [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in said.items()]


def _command(request: Mapping[str, Any], best: Estimate) -> str:
    """How to start the server that was planned."""
    wish, mesh, given = best.choice.wish, best.choice.mesh, request["config"]
    said = {
        "model": given.get("model", request["model"]), "mesh": name_of(mesh), "max_model_len": wish.context,
        "max_sequences": wish.on(mesh).scheduler.max_sequences,
    }  # fmt: skip
    flags = [*flags_of(said), *flags_of(given, PLANNED)]
    flags += ["--draft-model HEAD"] if wish.needs_head else []
    return " ".join(["python -m jaxinfer.serve", *flags])
