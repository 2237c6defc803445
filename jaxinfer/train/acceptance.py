"""How many of a student's drafts would stand: measured over what the target itself wrote, without running either as a server does.

A draft stands if it is what is drawn at its place, drawn with the noise of that (seed, position) (`step/verify.py`), and the student draws
with the same noise (`step/propose.py`). Where all drafts before it stood, the text that a draft goes on from is the target's own. So one
pass over that text gives every draft that would ever be compared: the student's draw at each place, once for each depth that it has, beside
the token that is there. Draft j of a place stands if the first j draws are the text's. Exact for a draft model; rounding aside, a model as
its own draft has all of its drafts stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxinfer import sampling
from jaxinfer.sampling import RowSettings
from jaxinfer.train.divergence import blocks, unblocked
from jaxinfer.train.learner import Learner
from jaxinfer.train.rows import Rows, Text, pack
from jaxinfer.train.student import Leaves, Lesson, Weights

DRAFTS = 4
BLOCK = 64


@dataclass(frozen=True)
class Acceptance:
    """agreement: share of all tokens that are the first draft there. stand[j]: share of places where drafts 0..j all stand, of those
    `places` behind which the text has so many tokens. tokens: what a step gives on average, 1 + the sum of `stand`."""

    temperature: float
    agreement: float
    tokens_compared: int
    stand: tuple[float, ...]
    places: int

    @property
    def tokens(self) -> float:
        """Tokens of a step."""
        return 1.0 + sum(self.stand)


@dataclass(frozen=True)
class Examiner:
    """Measures a learner's student over texts that the target made."""

    learner: Learner

    def measure(self, leaves: Leaves, weights: Weights, texts: Sequence[Text]) -> list[Acceptance]:
        """One figure for each temperature that the texts were made at."""
        learner, size = self.learner, self.learner.recipe.rows
        run = jax.jit(self.draws)
        hits: dict[float, list[np.ndarray]] = {}
        packed = pack(texts, learner.length, size)
        for start in range(0, len(packed.tokens), size):
            rows = Rows(*(values[start : start + size] for values in packed))
            drawn = np.asarray(run(leaves, weights, learner.put(rows), self._settings(rows, texts)))
            for number in np.unique(rows.owner[rows.owner >= 0]):
                text, own = texts[int(number)], rows.owner.reshape(-1) == number
                hits.setdefault(float(text.temperature or 0.0), []).append(_hits(drawn[:, own], text))
        return [_acceptance(temperature, found) for temperature, found in sorted(hits.items())]

    def draws(self, leaves: Leaves, weights: Weights, rows: dict[str, Array], settings: dict[str, Array]) -> Int[Array, "depth tokens"]:
        """What the student draws after each place, for each depth that it has."""
        learner, tokens = self.learner, rows["tokens"].shape[0]
        teacher, student = learner.teacher, learner.student
        seen = teacher.look(leaves, rows["tokens"], learner.context(rows["positions"]), student.tapped)
        lesson = Lesson(rows["tokens"], learner.context(rows["positions"], student=True), seen.features, leaves)
        replicas, found = teacher.placement.mesh.shape["data"], []
        for ahead, hidden in enumerate(student.hidden(weights, lesson)):
            parts = (hidden, settings["seed"], settings["temperature"], rows["positions"] + 1 + ahead)
            drawn = jax.lax.map(lambda part: self._block(leaves, weights, *part), tuple(blocks(part, replicas, BLOCK) for part in parts))
            found.append(unblocked(drawn, replicas, tokens))
        return jnp.stack(found)

    def _block(
        self, leaves: Leaves, weights: Weights, hidden: Float[Array, "places embed"], seed: UInt32[Array, "places 2"],
        temperature: Float[Array, " places"], position: Int[Array, " places"],
    ) -> Int[Array, " places"]:  # fmt: skip
        teacher, student, zero = self.learner.teacher, self.learner.student, jnp.zeros_like(temperature)
        logits, known = student.head(weights, hidden, leaves), student.vocabulary
        if known is not None:
            never = jnp.full((len(hidden), teacher.graph.config.vocab_size), sampling.NEVER)
            logits = never.at[:, jnp.asarray(known)].set(logits)
        settings = RowSettings(
            temperature=temperature, top_p=zero + 1, min_p=zero, presence=zero, frequency=zero, repetition=zero + 1,
            top_k=jnp.zeros_like(position), logprobs=jnp.full_like(position, -1), seed=seed, position=position,
        )  # fmt: skip
        return sampling.sample(logits, logits, settings).token

    def _settings(self, rows: Rows, texts: Sequence[Text]) -> dict[str, Array]:
        """Seed and temperature of each place's text."""
        seeds = np.array([(text.seed >> 32, text.seed) for text in texts] + [(0, 0)], np.uint64) & np.uint64(0xFFFFFFFF)
        warmth = np.array([text.temperature or 0.0 for text in texts] + [0.0], np.float32)
        owner = rows.owner.reshape(-1)
        return {"seed": jnp.asarray(seeds.astype(np.uint32)[owner]), "temperature": jnp.asarray(warmth[owner])}


def _hits(drawn: Int[np.ndarray, "depth tokens"], text: Text) -> Bool[np.ndarray, "places drafts"]:
    """For each token of a text behind its prompt, whether the first draft for it stands, and whether those for the ones behind it do (False
    where the text is over)."""
    tokens, depth = np.asarray(text.tokens), len(drawn)
    places = np.arange(text.first - 1, len(tokens) - 1)
    found = np.zeros((len(places), DRAFTS), bool)
    for ahead in range(DRAFTS):
        level, there = min(ahead, depth - 1), places[: max(len(places) - ahead, 0)]
        found[: len(there), ahead] = drawn[level, there + ahead - level] == tokens[there + 1 + ahead]
    return found


def _acceptance(temperature: float, hits: Sequence[np.ndarray]) -> Acceptance:
    first = np.concatenate([found[:, 0] for found in hits])
    whole = np.concatenate([found[: max(len(found) - DRAFTS + 1, 0)] for found in hits])
    stand = np.cumprod(whole, axis=1).mean(axis=0) if len(whole) else np.zeros(DRAFTS)
    return Acceptance(temperature, float(first.mean()), len(first), tuple(float(share) for share in stand), len(whole))
