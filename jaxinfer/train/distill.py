"""One distillation from prompts to a folder that can be served: texts, figures before, steps, figures after, weights.

Every stage leaves what it made in the run's own folder (`state.py`), so that a run which was killed goes on with the stage that it was in.
The result appears whole or not at all. This file does not know flags or how results are shown.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer import devices, prompts
from jaxinfer.checkpoint import hub, manifest, read
from jaxinfer.checkpoint.atomic import check_target, new_folder
from jaxinfer.config import ConfigError, EngineConfig, MeshShape, from_arguments
from jaxinfer.models.layers import Placement
from jaxinfer.planner import sizing
from jaxinfer.sharding import make_mesh
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.train import answers, page, student
from jaxinfer.train.acceptance import Acceptance, Examiner
from jaxinfer.train.answers import Asked, Texts, Wanted
from jaxinfer.train.learner import Learner, Recipe, State
from jaxinfer.train.rows import batch as batch_of
from jaxinfer.train.rows import length_for, pack
from jaxinfer.train.state import Run
from jaxinfer.train.teacher import Leaves, Teacher

LENGTH = 1024  # of prompt and answer, unless the user says more
SEQUENCES, MANY = 32, 256  # answered at once; on an accelerator
TOLD = 500  # steps between two lines of the log
AHEAD = 16  # steps that are sent to the devices before the last of them is waited for
FIGURES, PAGE = "distill.json", "distill.html"

Progress = Callable[[str, int, int], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the user chose. state: the run's own folder. save_seconds: between two states that are kept. answers: a file of the texts,
    made if it is not there (None: in the run's folder)."""

    target: str
    draft: str
    out: Path
    state: Path
    revision: str | None = None
    overwrite: bool = False
    mesh: MeshShape = MeshShape()
    dtype: str = "auto"
    max_model_len: int | None = None
    save_seconds: float = 60.0
    answers: Path | None = None
    wanted: Wanted = Wanted()
    recipe: Recipe = Recipe()

    def __post_init__(self) -> None:
        if self.recipe.rows % self.mesh.data:
            raise ConfigError(f"--batch {self.recipe.rows} rows do not divide over {self.mesh.data} replicas; use a multiple")


@dataclass(frozen=True)
class Course:
    """A run under way: who learns, from what, and where it is kept."""

    run: Run
    learner: Learner
    leaves: Leaves
    texts: Texts
    progress: Progress


class Data(NamedTuple):
    """The user's lines, and those to measure on (None: a share of the former)."""

    lines: prompts.Lines
    held_out: prompts.Lines | None = None


def distill(settings: Settings, data: Data, stamp: Callable[[], dict[str, Any]], progress: Progress) -> dict[str, Any]:
    """Train the draft and write it; the figures, as they stand in the folder's distill.json.

    Raises:
        ConfigError, CheckpointError, TokenizerError: a line, a model or a folder that cannot be used.
    """
    check_target(settings.out, overwrite=settings.overwrite)
    folder = hub.resolve(settings.target, settings.revision)
    begun, teacher = time.perf_counter(), _teacher(settings, folder)
    learns = student.find(settings.draft)(settings.draft, teacher, settings.recipe.seed)
    context = teacher.graph.config.max_positions
    run, about = Run(settings.state, _fingerprint(settings, data, folder)), _about(settings, data, folder)
    path = settings.answers or run.texts
    if path.is_file():
        texts = answers.read(path, about)
    else:
        asked = _asked(settings, data, Tokenizer.load(folder), min(settings.max_model_len or LENGTH, context))
        texts = _answered(settings, asked, progress)
        answers.write(path, texts, about)
    if settings.wanted.learn == "all":
        texts = texts._replace(train=tuple(text._replace(first=1) for text in texts.train))
    length = length_for((*texts.train, *texts.held_out), 2 * prompts_mean(texts))
    leaves = teacher.load(lambda done, total: progress("read", done, total))
    course = Course(run, Learner(teacher, learns, settings.recipe, length), leaves, texts, progress)
    state = course.run.restore(course.learner.start())
    before = _measured(course, "before", state)
    state = learn(course, state, settings.save_seconds)
    after = _measured(course, "after", state)
    figures = {
        "target": settings.target, "draft": settings.draft, "parameters": sum(math.prod(spec.shape) for spec in learns.specs.values()),
        "data": {
            "file": data.lines.name, "sha256": data.lines.sha256, "lines": len(data.lines.lines),
            "texts": len(texts.train), "held_out": len(texts.held_out),
            "learned_tokens": sum(len(it.tokens) - it.first for it in texts.train), "cut": texts.cut,
            "measured_on": data.held_out.name if data.held_out else None,
        },
        "recipe": asdict(settings.recipe), "texts": asdict(settings.wanted), "length": length,
        "loss": [round(float(value), 5) for value in np.asarray(state.losses)[: int(state.step)]],
        "before": before, "after": after, "seconds": round(time.perf_counter() - begun, 1), **stamp(),
    }  # fmt: skip
    with new_folder(settings.out, overwrite=settings.overwrite) as made:
        hashes = learns.save(made, state.weights)
        (made / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        (made / PAGE).write_text(page.render(figures), encoding="utf-8")
        manifest.write(made, hashes)
    run.remove()
    return figures


def learn(course: Course, state: State, save_seconds: float) -> State:
    """The steps that are left, a state kept every so many seconds and at the end. The devices always have steps ahead of them.

    Raises:
        ConfigError: the loss is no longer a number.
    """
    learner, total = course.learner, course.learner.recipe.steps
    rows = pack(course.texts.train, learner.length)
    clock, number = Clock(learner.recipe, float((course.run.noted("spent") or {}).get("seconds", 0.0))), int(state.step)
    if clock.done(number) >= 1:
        return state
    course.progress("compile", 0, 1)
    step = learner.compiled(course.leaves, state)
    course.progress("compile", 1, 1)
    clock = clock.started()
    saved = time.monotonic()
    while (share := clock.done(number)) < 1:
        done = np.float32(min(share + 1 / total, 1.0))
        state = step(course.leaves, state, learner.put(batch_of(rows, learner.recipe.rows, number, learner.recipe.seed)), done)
        number += 1
        if number % AHEAD == 0:
            jax.block_until_ready(state.step)
        if number % TOLD == 0:
            mean = float(np.asarray(state.losses)[number - TOLD : number].mean())
            logger.info("step %d: KL %.4f nats, %.1f s", number, mean, clock.spent)
        course.progress("learn", number, total)
        if clock.done(number) >= 1 or time.monotonic() - saved > save_seconds:
            if not np.isfinite(np.asarray(state.losses)[:number]).all():
                raise ConfigError(f"the loss is not finite by step {number}; use a lower --learning-rate")
            course.run.save(state)
            course.run.note("spent", {"seconds": clock.spent})
            saved = time.monotonic()
    return state


@dataclass(frozen=True)
class Clock:
    """How much of a run is done. before: seconds that were spent on learning before this process. begun: on the monotonic clock."""

    recipe: Recipe
    before: float
    begun: float | None = None

    @property
    def spent(self) -> float:
        """Seconds of learning."""
        return self.before + (0.0 if self.begun is None else time.monotonic() - self.begun)

    def started(self) -> Clock:
        """From now on it runs."""
        return replace(self, begun=time.monotonic())

    def done(self, steps: int) -> float:
        """The share that is done after so many steps, 1 at the end."""
        return max(steps / self.recipe.steps, 0.0 if self.recipe.seconds is None else self.spent / self.recipe.seconds)


def prompts_mean(texts: Texts) -> int:
    """Tokens of a text, on average."""
    both = (*texts.train, *texts.held_out)
    return sum(len(text.tokens) for text in both) // max(len(both), 1)


def _teacher(settings: Settings, folder: Path) -> Teacher:
    devices.prepare(settings.mesh.size)
    try:
        mesh = make_mesh(settings.mesh._asdict(), devices.select(settings.mesh.size))
    except devices.DeviceError as error:
        raise ConfigError(f"--mesh: {error}") from None
    described = sizing.described(read.read_config(folder), _engine(settings), devices.platform(), folder)
    return Teacher(folder, settings.target, described.graph, Placement(mesh))


def _engine(settings: Settings, longest: int | None = None) -> EngineConfig:
    values = {"model": settings.target, "revision": settings.revision, "dtype": settings.dtype, "mesh": settings.mesh}
    sequences = SEQUENCES if devices.platform() == "cpu" else MANY
    sizes = {} if longest is None else {"max_model_len": longest, "max_sequences": sequences}
    return from_arguments(EngineConfig, {**values, **sizes})


def _asked(settings: Settings, data: Data, tokenizer: Tokenizer, longest: int) -> Asked:
    """The lines in tokens, those to measure on apart."""
    documents, measured = (prompts.encode(part, tokenizer, longest) if part else [] for part in data)
    return Asked(documents, measured) if measured else Asked(*answers.split(documents, settings.wanted))


def _answered(settings: Settings, asked: Asked, progress: Progress) -> Texts:
    """What the run learns from."""
    both = (*asked.learned, *asked.held_out)
    longest = max(len(it.prompt) + max(len(it.completion), min(settings.wanted.max_tokens, it.room)) for it in both)
    begun = time.perf_counter()
    texts = answers.make(_engine(settings, max(longest, 2)), asked, settings.wanted, progress)
    took = time.perf_counter() - begun
    logger.info("%d texts to learn from and %d held out, made in %.1f s", len(texts.train), len(texts.held_out), took)
    return texts


def _measured(course: Course, name: str, state: State) -> list[dict[str, Any]]:
    """Acceptance on the held-out texts; "before" is kept, since a run that goes on has other weights by then."""
    kept = course.run.noted(name)
    if kept is None:
        found = Examiner(course.learner).measure(course.leaves, state.weights, course.texts.held_out)
        kept = {"acceptance": [as_json(it) for it in found]}
        course.run.note(name, kept)
    return kept["acceptance"]


def as_json(found: Acceptance) -> dict[str, Any]:
    """One temperature's figures."""
    return {
        "temperature": found.temperature, "agreement": round(found.agreement, 4), "tokens_compared": found.tokens_compared,
        "stand": [round(share, 4) for share in found.stand], "places": found.places, "tokens_per_step": round(found.tokens, 3),
    }  # fmt: skip


def _about(settings: Settings, data: Data, folder: Path) -> dict[str, Any]:
    """What the texts depend on."""
    weights = sorted((path.name, path.stat().st_size) for path in folder.glob("*.safetensors"))
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return {
        "target": [config, weights], "data": [part and part.sha256 for part in data], "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "texts": {name: value for name, value in asdict(settings.wanted).items() if name != "learn"},
    }  # fmt: skip


def _fingerprint(settings: Settings, data: Data, folder: Path) -> Mapping[str, Any]:
    """What makes a run the same run: everything that its result depends on."""
    own = {"draft": settings.draft, "learn": settings.wanted.learn, "mesh": list(settings.mesh), "recipe": asdict(settings.recipe)}
    return {**_about(settings, data, folder), **own}
