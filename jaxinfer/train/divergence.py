"""KL(target || student) at every place that counts, in nats, a block of places at a time.

Both models' logits are made from hidden states inside a loop, compared and forgotten; the gradient makes them again (`jax.checkpoint`). So
of distributions over the vocabulary only BLOCK places per replica exist at once, whatever the batch. A student that knows a part of the
vocabulary is compared over that part, the target's distribution renormalised to it (as in EAGLE-3: Li et al. 2025, arXiv 2503.01840).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxinfer.train.student import Lesson, Student, Weights
from jaxinfer.train.teacher import Seen, Teacher

BLOCK = 128
DECAY = 0.8  # what a token further ahead weighs, for students with depth


class Divergence(NamedTuple):
    """Means over the places that count: what is minimised, and the divergence for each token ahead."""

    loss: Float[Array, ""]
    ahead: Float[Array, " depth"]


def divergence(
    teacher: Teacher, student: Student, weights: Weights, lesson: Lesson, seen: Seen, learned: Bool[Array, " tokens"]
) -> Divergence:  # fmt: skip
    """How far the student is from the target; differentiable in its weights. learned: places whose next token counts."""
    positions, found = lesson.context.positions, []
    for ahead, hidden in enumerate(student.hidden(weights, lesson)):
        same = (positions >= 0) & (jnp.roll(positions, -ahead) == positions + ahead)
        counts = same & jnp.roll(learned, -ahead)
        found.append(_mean(teacher, student, weights, lesson, (jnp.roll(seen.hidden, -ahead, axis=0), hidden), counts))
    means = jnp.stack(found)
    factors = jnp.asarray(DECAY ** np.arange(len(found)) / np.sum(DECAY ** np.arange(len(found))), jnp.float32)
    return Divergence(jnp.sum(means * factors), means)


def kl(target: Float[Array, "places vocab"], logits: Float[Array, "places vocab"]) -> Float[Array, " places"]:
    """KL(softmax(target) || softmax(logits)) of each row, in float32."""
    p, q = (jax.nn.log_softmax(values.astype(jnp.float32), axis=-1) for values in (target, logits))
    return jnp.sum(jnp.where(p > -jnp.inf, jnp.exp(p) * (p - q), 0.0), axis=-1)


def blocks(values: Array, replicas: int, block: int = BLOCK) -> Array:
    """[tokens, ...] -> [blocks, replicas * block, ...], filled up with zeros: each replica's own tokens stay with it."""
    own = values.reshape(replicas, -1, *values.shape[1:])
    size = min(block, own.shape[1])
    own = jnp.pad(own, ((0, 0), (0, -own.shape[1] % size), *((0, 0),) * (values.ndim - 1)))
    cut = own.reshape(replicas, -1, size, *values.shape[1:])
    return jnp.swapaxes(cut, 0, 1).reshape(-1, replicas * size, *values.shape[1:])


def unblocked(values: Array, replicas: int, tokens: int) -> Array:
    """The inverse of `blocks`."""
    rest = values.shape[2:]
    own = jnp.swapaxes(values.reshape(values.shape[0], replicas, -1, *rest), 0, 1)
    return own.reshape(replicas, -1, *rest)[:, : tokens // replicas].reshape(tokens, *rest)


def _mean(
    teacher: Teacher, student: Student, weights: Weights, lesson: Lesson, hidden: tuple[Array, Array], counts: Bool[Array, " tokens"]
) -> Float[Array, ""]:  # fmt: skip
    known = None if student.vocabulary is None else jnp.asarray(student.vocabulary)

    @jax.checkpoint
    def total(sum_: Float[Array, ""], part: tuple[Array, Array, Array]) -> tuple[Float[Array, ""], None]:
        theirs, ours, counted = part
        target = jax.lax.stop_gradient(teacher.head(lesson.leaves, theirs))
        logits = student.head(weights, ours, lesson.leaves)
        each = kl(target[:, : logits.shape[1]] if known is None else target[:, known], logits)
        return sum_ + jnp.sum(jnp.where(counted, each, 0.0)), None

    replicas = teacher.placement.mesh.shape["data"]
    parts = tuple(blocks(values, replicas) for values in (*hidden, counts))
    summed, _ = jax.lax.scan(total, jnp.zeros((), jnp.float32), parts)
    return summed / jnp.maximum(jnp.sum(counts), 1).astype(jnp.float32)
