"""What a plan says, as plain data: JSON for programs, and the pieces that text.py shows. Plain Python."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from jaxinfer.config import MeshShape

GOALS = ("throughput", "latency", "cost")
MARK = "jaxinfer-plan "  # before each line of progress that a child writes


class Wanted(NamedTuple):
    """What a plan is asked for, beside model, slice and the engine's settings. None: see `jaxinfer plan --help`.

    compile: whether to ask the compiler (else everything is arithmetic). all: compile every program of the list. bundle: a folder to write
    all of them to (see step/bundle.py). autotune: a file with XLA's choices of GPU kernels.
    """

    context: int | None = None
    concurrency: int | None = None
    output: int | None = None
    goal: str = "throughput"
    price: float | None = None
    mesh: MeshShape | None = None
    compile: bool = True
    all: bool = False
    bundle: str | None = None
    autotune: str | None = None


@dataclass(frozen=True)
class Plan:
    """One model on one slice. Bytes are per device; times in seconds; rates count the whole slice.

    target: slice, chips, devices, topology, memory. settings: what was asked for, and the mesh that was chosen. memory, capacity, phases,
    speed: of that mesh. meshes: the arrangements compared, best first. programs: those that were compiled, with what the compiler says.
    advice: changes that help, with their effect. notes: what is guessed, and where efficiencies come from. command: starts all that.
    failure: what ended the work, None where nothing did; refused: it was a setting, shape or package that cannot work.
    """

    model: str
    target: dict[str, Any]
    settings: dict[str, Any]
    fits: bool
    failure: str | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    capacity: dict[str, Any] = field(default_factory=dict)
    phases: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    meshes: list[dict[str, Any]] = field(default_factory=list)
    programs: dict[str, Any] = field(default_factory=dict)
    advice: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    command: str = ""
    refused: bool = False

    def fields(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)
