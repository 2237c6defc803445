"""What a student is: whatever drafts for a target model and can learn to. One file in this folder for each kind, found by its name.

A student's file offers `student(name, teacher, seed) -> Student` and nothing need be registered: `--draft eagle` asks `eagle.py`, any other
`--draft` is a model for `draft.py`. The rest of the folder makes texts, runs the target over them, trains, saves, measures and writes; it
knows students by this protocol alone.

The life of one step: packed texts become a `Lesson` (the target's features are in it if the student reads any); `Student.hidden` turns it
into hidden states, `Student.head` those into logits, a block of places at a time (`divergence.py`), and KL(target || student) at every
place that counts is what is learned. Both are called inside a trace with the weights as arguments, and are differentiated: no paged cache,
no kernel without a gradient, nothing quantised among the student's own weights. Model files run unchanged with `lesson.context`, whose
`metadata` is `Sequences` (models/layers.py): attention within each text, over no pool.

Places. Position t of a text holds token x[t]. What a student makes of place t, j tokens ahead (j = 0, 1, ...), is its guess of x[t + 1 + j]
when x[0..t + j] are known and the target has run over x[0..t - 1] only: features of places from t on must not reach it (so it is when
serving, where x[t] was just drawn). A draft model reads no features: what it makes of t, j ahead, is what it makes of t + j: depth 1.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer import train
from jaxinfer.models.layers import StepContext
from jaxinfer.sharding import ArraySpec

if TYPE_CHECKING:
    from jaxinfer.train.teacher import Teacher

ANY_MODEL = "draft"  # the student for a --draft that names no kind
Weights = dict[str, Array]
Leaves = tuple[Array, ...]


@dataclass(frozen=True)
class Lesson:
    """Packed texts and what the target left of them. Lives inside a trace only, so it is not a pytree.

    tokens: rows of `context.metadata.length` tokens, one row after another, whole texts side by side in a row. context.positions: the
    place of each token in its text, so 0 begins one; -1 is padding, at the end of a row. features: the residual stream of the target before
    each of the layers that the student taps, side by side, at the same places; features[t] has seen tokens[t], and a student uses it for
    places after t (see above). leaves: the target's own arrays, for a student that borrows its embedding or head; nothing learns through
    them.
    """

    tokens: Int[Array, " tokens"]
    context: StepContext
    features: Float[Array, "tokens features"]
    leaves: Leaves


@runtime_checkable
class Student(Protocol):
    """One kind of draft for one target. Static; its weights travel beside it, float32, sharded as `specs` say."""

    @property
    def specs(self) -> Mapping[str, ArraySpec]:
        """What is learned, by name: float32 arrays with logical axes. Weights, moments and checkpoints are placed by it."""
        ...

    @property
    def tapped(self) -> tuple[int, ...]:
        """The target's layers before which it reads the residual stream, in the order of `Lesson.features` (the number of layers: after the
        last); () for none."""
        ...

    @property
    def depth(self) -> int:
        """How many tokens ahead it has hidden states of their own for: 1 if what it makes of t, j ahead, is what it makes of t + j."""
        ...

    @property
    def vocabulary(self) -> np.ndarray | None:
        """The target's token id of each of the student's logits [student vocab]; None where they are the target's own, in its order."""
        ...

    def begin(self) -> Weights:
        """The weights to start from, on the mesh: those of a model, or drawn from the seed (the same ones whatever the mesh)."""
        ...

    def hidden(self, weights: Weights, lesson: Lesson) -> tuple[Float[Array, "tokens embed"], ...]:
        """`depth` arrays: what is made of each place 0, 1, ... tokens ahead. Differentiable in `weights`; finite at padding too."""
        ...

    def head(self, weights: Weights, hidden: Float[Array, "places embed"], leaves: Leaves) -> Float[Array, "places vocab"]:
        """Float32 logits of some of those hidden states. Differentiable in `weights` and `hidden`."""
        ...

    def save(self, folder: Path, weights: Weights) -> Mapping[str, Mapping[str, str]]:
        """Write into a folder what `serve --draft-model` takes: config, weights, tokenizer; the SHA-256 of each tensor, by file (what
        `checkpoint.save` and `checkpoint.write` return). Figures and the manifest are written by whoever calls."""
        ...


Factory = Callable[[str, "Teacher", int], Student]


def kinds() -> dict[str, ModuleType]:
    """Every kind of student by its name: the modules of this folder that offer `student`."""
    modules = {item.name: f"{train.__name__}.{item.name}" for item in pkgutil.iter_modules(train.__path__)}
    named = {name: importlib.import_module(module) for name, module in modules.items() if module != __name__}
    return {name: module for name, module in named.items() if callable(getattr(module, "student", None))}


def find(name: str) -> Factory:
    """How to make the student that `--draft` names: a kind, or a model (folder, config.json, repository) for `draft.py`."""
    found = kinds()
    return (found[name] if name in found and name != ANY_MODEL else found[ANY_MODEL]).student
