"""The training step: the demo learns from two pools of windows, the draft learns from the same windows and from the demo's logits.

Life of the data: a batch of prose windows and one of chat windows -> losses of both networks -> AdamW updates; a state is plain arrays and
is saved and restored with Orbax. What this file does NOT know: where windows come from, when to stop.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from checkpoints.conversations import COUNTS, TOKEN
from checkpoints.network import Network, Params


@dataclass(frozen=True)
class Recipe:
    """What does not change during a run; lengths in tokens, rows in windows per step, `chat_tokens` how much chat is generated."""

    prose_rows: int = 32
    prose_length: int = 2048
    chat_rows: int = 64
    chat_length: int = 1024
    chat_share: float = 0.4
    dialogue_share: float = 1 / 3
    chat_tokens: int = 150_000_000
    learning_rate: float = 2e-3
    draft_learning_rate: float = 4e-3
    distilled_share: float = 0.5
    weight_decay: float = 0.1
    warmup: float = 0.02
    seed: int = 0
    drill_share: float = 0.0

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.prose_rows * self.prose_length + self.chat_rows * self.chat_length

    def rate(self, progress: float) -> float:
        """The multiple of the peak learning rates at `progress` in [0, 1]: a linear warm-up, then a cosine to zero."""
        if progress < self.warmup:
            return progress / self.warmup
        done = min(1.0, (progress - self.warmup) / (1 - self.warmup))
        return 0.5 * (1 + float(np.cos(np.pi * done)))


POLISH = Recipe(
    16, 2048, 96, 1024, 0.6, 0.15, 90_000_000, learning_rate=8e-4, draft_learning_rate=2e-3, distilled_share=0.8, warmup=0.05, seed=1
)  # fmt: skip
DRILL = replace(POLISH, dialogue_share=0.1, chat_tokens=65_000_000, learning_rate=6e-4, seed=2, drill_share=0.35)


class State(NamedTuple):
    """Weights and moments of the demo and the draft, and the number of steps behind them."""

    demo: Params
    draft: Params
    demo_moments: Any
    draft_moments: Any
    steps: jax.Array


class Losses(NamedTuple):
    """Mean losses of a step in nats per counted token: the demo's on each pool, the draft's on both and its divergence."""

    prose: jax.Array
    chat: jax.Array
    draft: jax.Array
    divergence: jax.Array


def _is_matrix(params: Any) -> dict[str, bool]:
    """Which weights are decayed: matrices, not the scales of norms."""
    return {name: array.ndim > 1 for name, array in params.items()}


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW without its learning rate, which every step brings along; vectors are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(recipe.weight_decay, mask=_is_matrix),
    )


@dataclass(frozen=True)
class Learner:
    """The two networks and the recipe; `step` is the compiled function, `start` makes the first state."""

    demo: Network
    draft: Network
    recipe: Recipe

    def start(self, demo: Params, draft: Params) -> State:
        """The state before the first step."""
        optimizer = _optimizer(self.recipe)
        return State(demo, draft, optimizer.init(demo), optimizer.init(draft), jnp.zeros((), jnp.int32))

    def _window_losses(self, demo: Params, draft: Params, windows: jax.Array) -> jax.Array:
        """The demo's loss, the draft's and its divergence from the demo as [3], means over the counted tokens of uint16 windows."""
        tokens = (windows & TOKEN).astype(jnp.int32)
        weights = (windows[:, 1:] >= COUNTS).astype(jnp.float32)
        logs: list[jax.Array] = []
        for network, params in ((self.demo, demo), (self.draft, draft)):
            hidden = network.hidden_states(params, tokens[:, :-1])
            logits = network.logits(params, hidden, jnp.dtype(jnp.bfloat16)).astype(jnp.float32)
            logs.append(logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        teacher_log, student_log = logs
        wanted = jnp.arange(teacher_log.shape[-1]) == tokens[:, 1:, None]  # a mask that fuses; a gather would scatter in the gradient
        hard = [-jnp.sum(jnp.where(wanted, log, 0.0), axis=-1) for log in logs]
        known = jax.lax.stop_gradient(teacher_log)
        soft = jnp.sum(jnp.exp(known) * (known - student_log), axis=-1)
        total = jnp.maximum(weights.sum(), 1.0)
        return jnp.stack([jnp.sum(loss * weights) / total for loss in (*hard, soft)])

    def _loss(self, both: tuple[Params, Params], prose: jax.Array, chat: jax.Array) -> tuple[jax.Array, Losses]:
        """The sum that is differentiated, and its parts; the two networks share no weight, so their gradients do not mix."""
        share, soft = self.recipe.chat_share, self.recipe.distilled_share
        on_prose, on_chat = (self._window_losses(*both, windows) for windows in (prose, chat))
        mixed = (1 - share) * on_prose + share * on_chat
        total = mixed[0] + (1 - soft) * mixed[1] + soft * mixed[2]
        return total, Losses(on_prose[0], on_chat[0], mixed[1], mixed[2])

    def step(self, state: State, prose: jax.Array, chat: jax.Array, rate: jax.Array) -> tuple[State, Losses]:
        """One update of both networks; `rate` is the multiple of the peak learning rates. Donates the state when compiled."""
        gradients, losses = jax.grad(self._loss, has_aux=True)((state.demo, state.draft), prose, chat)
        optimizer = _optimizer(self.recipe)

        def updated(params: Params, moments: Any, gradient: Params, peak: float) -> tuple[Params, Any]:
            updates, moments = optimizer.update(gradient, moments, params)
            return jax.tree.map(lambda weight, update: weight - peak * rate * update, params, updates), moments

        demo, demo_moments = updated(state.demo, state.demo_moments, gradients[0], self.recipe.learning_rate)
        draft, draft_moments = updated(state.draft, state.draft_moments, gradients[1], self.recipe.draft_learning_rate)
        return State(demo, draft, demo_moments, draft_moments, state.steps + 1), losses

    def compiled(self, state: State) -> jax.stages.Compiled:
        """The step compiled for the recipe's batch; its first argument is donated."""
        recipe = self.recipe
        prose = jax.ShapeDtypeStruct((recipe.prose_rows, recipe.prose_length + 1), jnp.uint16)
        chat = jax.ShapeDtypeStruct((recipe.chat_rows, recipe.chat_length + 1), jnp.uint16)
        return jax.jit(self.step, donate_argnums=0).lower(state, prose, chat, jax.ShapeDtypeStruct((), jnp.float32)).compile()


def batch(windows: np.ndarray, rows: int, step: int, seed: int) -> np.ndarray:
    """The `rows` windows of a step: every epoch is a new permutation, and a step's rows do not depend on the steps before it."""
    wanted = np.arange(step * rows, (step + 1) * rows)
    epochs = wanted // len(windows)
    order = {int(epoch): np.random.default_rng((seed, int(epoch))).permutation(len(windows)) for epoch in np.unique(epochs)}
    return windows[[order[int(epoch)][i % len(windows)] for epoch, i in zip(epochs, wanted, strict=True)]]


def save(folder: Path, state: State, seconds: float) -> None:
    """Save the state and the training seconds behind it with Orbax into `folder`, replacing what is there."""
    arrays = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))} | {"seconds": np.asarray(seconds)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), arrays, force=True)


def restore(folder: Path, state: State) -> tuple[State, float]:
    """A state of the same structure as `state` and its training seconds, from `folder`; raises what Orbax raises when it does not fit."""
    leaves, structure = jax.tree.flatten(state)
    target = {str(i): leaf for i, leaf in enumerate(leaves)} | {"seconds": np.asarray(0.0)}
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(folder.resolve(), target)
    return jax.tree.unflatten(structure, [arrays[str(i)] for i in range(len(leaves))]), float(arrays["seconds"])
