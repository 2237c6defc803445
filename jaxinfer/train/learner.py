"""The training step: packed rows through target and student, the divergence's gradient, AdamW (optax) on float32 weights.

Life of a state: weights and moments, sharded by the weights' logical axes and replicated over `data`, whose gradients XLA sums; the loss of
every step so far and their number, so that what is saved is the whole run. One program, compiled once; it donates the state. This file does
not know where rows come from or when states are saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxinfer.config import ConfigError
from jaxinfer.models.layers import Sequences, StepContext
from jaxinfer.sharding import named
from jaxinfer.train.divergence import Counted, divergence
from jaxinfer.train.rows import Rows
from jaxinfer.train.student import Leaves, Lesson, Student, Weights
from jaxinfer.train.teacher import Teacher

LEARNED = ("tokens", "positions", "learned", "temperature")  # what a step reads of rows


@dataclass(frozen=True)
class Recipe:
    """What a run does. rows: of a batch. warmup: share of the steps. The rate rises linearly, then falls to zero along a cosine. seconds:
    of learning, at most; the rate then follows the clock, and the same run twice gives other weights.

    Raises:
        ConfigError: a number that makes no sense.
    """

    steps: int = 300
    rows: int = 8
    learning_rate: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    seed: int = 0
    seconds: float | None = None

    def __post_init__(self) -> None:
        for flag, value in (("steps", self.steps), ("batch", self.rows)):
            if value < 1:
                raise ConfigError(f"--{flag} {value} is below 1")
        if not 0 < self.learning_rate < 1:
            raise ConfigError(f"--learning-rate {self.learning_rate:g} is not in (0, 1); 0.001 is a good one to begin with")
        if self.seconds is not None and self.seconds <= 0:
            raise ConfigError(f"--seconds {self.seconds:g} is no time to learn in")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed} is below 0")

    def rate(self, done: Float[Array, ""]) -> Float[Array, ""]:
        """The learning rate of the step that ends when so much of the run is done."""
        warm = max(self.warmup, 1 / self.steps)
        falling = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip((done - warm) / max(1 - warm, 1e-6), 0.0, 1.0)))
        return self.learning_rate * jnp.minimum(done / warm, 1.0) * falling


class State(NamedTuple):
    """Weights, their moments, the loss of each step (0 where it is still to come), and the number of steps behind them."""

    weights: Weights
    moments: Any
    losses: Float[Array, " steps"]
    step: Int[Array, ""]


@dataclass(frozen=True)
class Learner:
    """A target, a student and a recipe."""

    teacher: Teacher
    student: Student
    recipe: Recipe
    length: int

    def start(self) -> State:
        """The state before the first step."""
        weights = self.student.begin()
        moments = jax.jit(self._optimizer.init, out_shardings=self._moments_shardings(weights))(weights)
        whole = NamedSharding(self.teacher.placement.mesh, PartitionSpec())
        losses, step = jnp.zeros(self.recipe.steps, jnp.float32), jnp.zeros((), jnp.int32)
        return State(weights, moments, jax.device_put(losses, whole), jax.device_put(step, whole))

    def step(self, leaves: Leaves, state: State, rows: Mapping[str, Array], done: Float[Array, ""]) -> State:
        """One update; rows as `put` gives them. done: share of the run that it completes. Donates the state when compiled."""

        def loss(weights: Weights) -> Float[Array, ""]:
            context = self.context(rows["positions"])
            seen = self.teacher.look(leaves, rows["tokens"], context, self.student.tapped)
            own = self.context(rows["positions"], student=True)
            lesson = Lesson(rows["tokens"], own, seen.features, leaves)
            counted = Counted(rows["learned"], rows["temperature"])
            return divergence(self.teacher, self.student, weights, lesson, seen, counted).loss

        value, gradients = jax.value_and_grad(loss)(state.weights)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, moments = self._optimizer.update(gradients, state.moments, state.weights)
            rate = self.recipe.rate(done)
            weights = jax.tree.map(lambda weight, update: weight - rate * update, state.weights, updates)
        return State(weights, moments, state.losses.at[state.step].set(value), state.step + 1)

    def compiled(self, leaves: Leaves, state: State) -> jax.stages.Compiled:
        """The step, compiled for the recipe's batches; its second argument is donated."""
        shape, sharding = (self.recipe.rows * self.length,), self._of_tokens
        described = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, dtype in zip(LEARNED, (np.int32, np.int32, np.bool_, np.float32), strict=True)
        }
        out = jax.tree.map(lambda array: array.sharding, state)
        done = jax.ShapeDtypeStruct((), np.float32)
        return jax.jit(self.step, donate_argnums=1, out_shardings=out).lower(leaves, state, described, done).compile()

    def put(self, rows: Rows) -> dict[str, Array]:
        """A batch on the devices, its rows dealt out over `data`."""
        return {name: jax.device_put(getattr(rows, name).reshape(-1), self._of_tokens) for name in LEARNED}

    @property
    def _of_tokens(self) -> NamedSharding:
        placement = self.teacher.placement
        return NamedSharding(placement.mesh, PartitionSpec(placement.rules.mesh_axis("tokens")))

    @property
    def _optimizer(self) -> optax.GradientTransformation:
        """AdamW without its rate; vectors are not decayed."""
        matrices = {name: len(spec.shape) > 1 for name, spec in self.student.specs.items()}
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(b1=0.9, b2=0.95),
            optax.add_decayed_weights(self.recipe.weight_decay, mask=matrices),
        )

    def _moments_shardings(self, weights: Weights) -> Any:
        """Moments lie as their weights do, counts on every device."""
        placement = self.teacher.placement
        specs = {name: named(spec, placement.mesh, placement.rules) for name, spec in self.student.specs.items()}
        whole = NamedSharding(placement.mesh, PartitionSpec())
        shapes = jax.eval_shape(self._optimizer.init, weights)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: next((specs[key.key] for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in specs), whole),
            shapes,
        )

    def context(self, positions: Int[Array, " tokens"], *, student: bool = False) -> StepContext:
        """Whole texts; for the student with matmuls that have a gradient."""
        placement = self.teacher.placement
        if student:
            placement = type(placement)(placement.mesh, placement.rules, "xla")
        return StepContext(positions, Sequences(self.length), placement)
