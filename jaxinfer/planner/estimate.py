"""One choice of slice, mesh and settings, weighed: does it fit, how much does it hold, how fast would it be, what would a token cost.

Needs one described device. What programs need is given once a compiler has said it, and guessed before. This file compares
numbers; it does not compile and does not know which choices there are.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer.cache.kv import CODES
from jaxinfer.config import EngineConfig, MeshShape
from jaxinfer.models.layers import Placement
from jaxinfer.planner.memory import Account
from jaxinfer.planner.predict import Kernels, Phase, Predictor
from jaxinfer.planner.sizing import Machine, Sizing, described, page_size, widths, with_draft, with_margin
from jaxinfer.planner.slices import Slice
from jaxinfer.planner.topology import chip_of, tabled, usable_memory
from jaxinfer.sharding import DEFAULT_RULES, MESH_AXES, make_mesh
from pallas_kernels import dispatch


@dataclass(frozen=True)
class Wish:
    """What is planned for. context: tokens of a sequence at its end, of which `output` are generated. concurrency: sequences at once that
    must fit, all replicas together (None: as many as do). price: of one chip for one hour. folder: the checkpoint's, if it is there. draft:
    the config.json (None: a head that is made up) and folder of what drafts, if anything does."""

    values: dict[str, Any]
    config: EngineConfig
    context: int
    output: int
    concurrency: int | None
    goal: str
    price: float | None
    folder: Path | None = None
    draft: tuple[dict[str, Any] | None, Path | None] | None = None

    @property
    def needs_head(self) -> bool:
        """Whether the head is made up and a start would need a real one."""
        return self.draft is not None and self.draft[0] is None and self.config.model.load_format != "random"

    def on(self, mesh: MeshShape) -> EngineConfig:
        """The engine's settings on a mesh."""
        per_replica = None if self.concurrency is None else -(-self.concurrency // mesh.data)
        scheduler = self.config.scheduler
        return replace(
            self.config, model=replace(self.config.model, max_model_len=self.context), execution=replace(self.config.execution, mesh=mesh),
            scheduler=replace(scheduler, max_sequences=scheduler.max_sequences or per_replica),
        )  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A slice, a mesh of it, and the wish with its settings. devices: described ones, or where nothing will be compiled only one of
    them or of this machine. memory: bytes that a device gives to arrays, None for what the runtime takes by default."""

    piece: Slice
    mesh: MeshShape
    wish: Wish
    devices: tuple[Any, ...]
    memory: int | None = None

    @property
    def usable_memory(self) -> int:
        """Bytes that a device gives to arrays."""
        return self.memory or usable_memory(self.piece)

    @property
    def arranged(self) -> Mesh:
        """The mesh; where the devices are too few, of the first one over and over: shards have their sizes, nothing can be compiled."""
        if len(self.devices) >= self.mesh.size:
            return make_mesh(self.mesh._asdict(), self.devices)
        grid = np.empty(tuple(self.mesh), dtype=object)
        grid[:] = self.devices[0]
        return Mesh(grid, MESH_AXES)

    def sizing(self) -> Sizing:
        """The engine's own way to a pool and its programs, for this choice."""
        config, platform = self.wish.on(self.mesh), self.piece.platform
        placement = Placement(self.arranged, DEFAULT_RULES, config.execution.implementation)
        model = described(self.wish.values, config, platform, self.wish.folder)
        if self.wish.draft is not None:
            model = with_draft(model, *self.wish.draft, config, platform)
        return Sizing(config, model, placement, Machine(platform, self.usable_memory))

    def target(self) -> Any:
        """Inside, kernels are chosen for the described devices (a context manager)."""
        if self.piece.platform == "cpu":
            return nullcontext()
        stand_ins = self.devices[0].platform == "cpu"
        mesh = tabled(self.mesh._asdict(), self.piece) if stand_ins else self.arranged.abstract_mesh
        return jax.sharding.use_abstract_mesh(mesh)


@dataclass(frozen=True)
class Estimate:
    """What a choice comes to. programs: bytes per device, from a compiler or guessed; reserved: what the pool leaves for them.

    concurrency: sequences of full length in the pool that the engine would make; largest: in all the memory. Rates count all devices.
    """

    choice: Choice
    account: Account
    programs: int
    reserved: int
    lacking: int
    kv_tokens: int
    concurrency: int
    largest: int
    running: int
    decode: Phase
    prefill: Phase
    predictor: Predictor
    page_size: int

    @property
    def fits(self) -> bool:
        """Whether the engine starts and holds what was asked for."""
        return self.lacking <= 0

    @property
    def hopeless(self) -> bool:
        """Whether not even one sequence fits beside weights and slots, whatever programs need."""
        return self.account.lacking(0) > 0

    @property
    def itl_loaded(self) -> float:
        """Seconds between a sequence's tokens while prompts of others are computed in between, in a steady state."""
        wish, data = self.choice.wish, self.choice.mesh.data
        return self.decode.seconds + max(1, self.running / data) * self.prefill.seconds / wish.output

    @property
    def ttft(self) -> float:
        """Seconds from a prompt to its first token when nothing else waits."""
        return self.prefill.seconds

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all replicas, prompts of the same requests included in the time."""
        return self.running / self.itl_loaded

    @property
    def cost(self) -> float | None:
        """Price of a million generated tokens, their prompts included."""
        price = self.choice.wish.price
        return None if price is None else price * self.choice.piece.chips / 3600 / self.tokens_per_second * 1e6

    @property
    def score(self) -> tuple[bool, float]:
        """The more the better, for the wish's goal; what fits comes before what does not."""
        speed = -self.decode.seconds if self.choice.wish.goal == "latency" else self.tokens_per_second
        if self.choice.wish.goal == "cost":
            speed /= self.choice.piece.chips
        return self.fits, speed if self.fits else -float(self.lacking)


def estimate(choice: Choice, kernels: Kernels, programs: int | None = None, correction: float = 1.0) -> Estimate:
    """Weigh a choice; `programs`: bytes per device as a compiler said (None: a guess).

    Raises:
        ConfigError: settings that no machine could run.
    """
    sizing = choice.sizing()
    account, wish, replicas = sizing.account(), choice.wish, choice.mesh.data
    reserved = account.guess if programs is None else with_margin(programs)
    sequences = 1 if wish.concurrency is None else -(-wish.concurrency // replicas)
    pages = max(0, account.pages(reserved))
    size = page_size(sizing.config, choice.piece.platform)
    widest = widths(sizing.config, choice.piece.platform)
    kv_tokens = pages * size * replicas
    fitting = min(pages // account.row, widest.sequences) * replicas
    running = wish.concurrency or (1 if wish.goal == "latency" else max(replicas, fitting))
    predictor = Predictor(
        graph=sizing.model.graph, placement=sizing.placement, chip=chip_of(choice.piece), kernels=kernels,
        kv_token=_read(sizing, account) / size, step_tokens=widest.tokens, correction=correction,
        codes=CODES[sizing.config.cache.kv_dtype] is not None,
    )  # fmt: skip
    decode = predictor.decode(max(1, running / replicas), max(1, wish.context - wish.output / 2))
    return Estimate(
        choice=choice, account=account, programs=reserved if programs is None else programs, reserved=reserved,
        lacking=account.lacking(reserved, sequences), kv_tokens=kv_tokens, concurrency=pages // account.row * replicas,
        largest=account.room(reserved, replicas) * replicas, running=running,
        decode=decode, prefill=predictor.prefill(max(1, wish.context - wish.output)), predictor=predictor, page_size=size,
    )  # fmt: skip


def _read(sizing: Sizing, account: Account) -> int:
    """Bytes of a page that the model itself reads: not the draft model's."""
    return account.page if sizing.model.draft is None else replace(sizing, model=replace(sizing.model, draft=None)).account().page


def kernels_for(sizing: Sizing) -> Kernels:
    """Which implementations `auto` takes; ask inside `Choice.target`."""
    graph, wanted = sizing.model.graph, sizing.config.execution.implementation
    shape, target = graph.config.attention_shapes[0], dispatch.target()
    key = {
        "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "dtype": graph.dtype.name, "heads": shape.heads,
        "page_size": page_size(sizing.config, sizing.machine.platform),
    }  # fmt: skip
    quantize = sizing.config.model.quantize
    op = "quantized_matmul" if quantize else "dense_matmul"
    attention, matmul = dispatch.choose("paged_attention", wanted, target, key), dispatch.choose(op, wanted, target, {})
    own = sizing.machine.platform  # kernels are named after their platform
    asked = wanted == "auto" and attention != own and own in dispatch.implementations("paged_attention")
    reason = dispatch.refusal("paged_attention", own, target, key) if asked else None
    return Kernels(attention, matmul, stored_as(quantize) or graph.dtype.name, reason)


def stored_as(quantize: str | None) -> str | None:
    """The scheme of most weights, of what `--quantize` says (SCHEME, or SCHEME,PATTERN=SCHEME...)."""
    return quantize and next((part for part in quantize.split(",") if "=" not in part), "mixed")
