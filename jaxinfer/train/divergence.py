"""KL(target || student) at every place that counts, in nats, a block of places at a time.

Both models' logits are made from hidden states inside a loop, compared and forgotten; the gradient makes them again (`jax.checkpoint`). So
of distributions over the vocabulary only a block of places per replica exists at once, whatever the batch. Places that count come first,
and blocks without any are passed over: where answers alone are learned, most places need no logits. Both distributions are taken at the
temperature of the text, as draws are. A student that knows a part of the
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

BLOCK = 128  # places, at least
LOGITS = 1 << 25  # of a block on an accelerator, where few large products are faster than many small ones
MILD = 1e-3  # the least temperature: what fills the last block up has none
DECAY = 0.8  # what a token further ahead weighs, for students with depth


class Counted(NamedTuple):
    """learned: places whose next token counts. temperature: at which it is compared."""

    learned: Bool[Array, " tokens"]
    temperature: Float[Array, " tokens"]


class Divergence(NamedTuple):
    """Means over the places that count: what is minimised, and the divergence for each token ahead."""

    loss: Float[Array, ""]
    ahead: Float[Array, " depth"]


def divergence(
    teacher: Teacher, student: Student, weights: Weights, lesson: Lesson, seen: Seen, counted: Counted
) -> Divergence:  # fmt: skip
    """How far the student is from the target; differentiable in its weights."""
    positions, found = lesson.context.positions, []
    for ahead, hidden in enumerate(student.hidden(weights, lesson)):
        same = (positions >= 0) & (jnp.roll(positions, -ahead) == positions + ahead)
        counts = same & jnp.roll(counted.learned, -ahead)
        compared = Compared(jnp.roll(seen.hidden, -ahead, axis=0), hidden, counts, jnp.roll(counted.temperature, -ahead))
        found.append(_mean(teacher, student, weights, lesson, compared))
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


class Compared(NamedTuple):
    """The target's hidden states and the student's, which places count, and at what temperature."""

    theirs: Float[Array, "tokens embed"]
    ours: Float[Array, "tokens width"]
    counts: Bool[Array, " tokens"]
    temperature: Float[Array, " tokens"]


def _mean(teacher: Teacher, student: Student, weights: Weights, lesson: Lesson, compared: Compared) -> Float[Array, ""]:
    known = None if student.vocabulary is None else jnp.asarray(student.vocabulary)
    mesh, vocab = teacher.placement.mesh, teacher.graph.config.vocab_size

    def summed(part: Compared) -> Float[Array, ""]:
        target = jax.lax.stop_gradient(teacher.head(lesson.leaves, part.theirs))
        logits, warmth = student.head(weights, part.ours, lesson.leaves), part.temperature[:, None]
        target = target[:, : logits.shape[1]] if known is None else target[:, known]
        each = part.temperature * kl(target / warmth, logits / warmth)  # slopes as large as at 1
        return jnp.sum(jnp.where(part.counts, each, 0.0))

    @jax.checkpoint
    def total(sum_: Float[Array, ""], part: Compared) -> tuple[Float[Array, ""], None]:
        return sum_ + jax.lax.cond(jnp.any(part.counts), summed, lambda _: jnp.zeros((), jnp.float32), part), None

    replicas = mesh.shape["data"]
    order = jnp.argsort(~compared.counts.reshape(replicas, -1), axis=1, stable=True)

    def ordered(values: Array) -> Array:
        own = values.reshape(replicas, -1, *values.shape[1:])
        return jax.vmap(lambda rows, places: rows[places])(own, order).reshape(values.shape)

    size = BLOCK if mesh.devices.flat[0].platform == "cpu" else max(BLOCK, LOGITS // vocab)
    whole = Compared(*(blocks(ordered(values), replicas, size) for values in compared))
    filled = whole._replace(temperature=jnp.maximum(whole.temperature, MILD))
    sum_, _ = jax.lax.scan(total, jnp.zeros((), jnp.float32), filled)
    return sum_ / jnp.maximum(jnp.sum(compared.counts), 1).astype(jnp.float32)
