"""The student that is an EAGLE-3 head, trained as it will be used (training-time test; Li et al. 2025, arXiv 2503.01840).

At each place the head first reads the target's features of the place before; then, a few tokens ahead, its own hidden state instead, while
what it attends to is as in serving: keys and values of true features up to the place, and behind it those of its own making. So all
places are unrolled at once: a matrix of scores against the true ones, a column for each token ahead.

The draft vocabulary is the target's first 32,000 ids: tokenizers number common tokens first. Token vectors are the target's and do not
learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.checkpoint import convert, save
from jaxinfer.checkpoint.write import Planned
from jaxinfer.config import ConfigError
from jaxinfer.models import eagle
from jaxinfer.models.graph import Graph, random_weights
from jaxinfer.models.layers import Placement, Sequences
from jaxinfer.sharding import ArraySpec
from jaxinfer.train.student import Leaves, Lesson, Weights
from jaxinfer.train.teacher import Teacher
from pallas_kernels.attention import rope_table, rotate

DEPTH = 4  # tokens ahead
VOCABULARY = "d2t"


class Keys(NamedTuple):
    """Keys and values of all places, for one token ahead."""

    k: Float[Array, "tokens kv_heads head_dim"]
    v: Float[Array, "tokens kv_heads head_dim"]


@dataclass(frozen=True)
class EagleHead:
    """A head that learns. graph: in the dtype that it computes in. target: the model's description; folder: where its tokenizer is."""

    graph: Graph
    target: Graph
    placement: Placement
    folder: Path
    seed: int

    @property
    def whole(self) -> Graph:
        """The graph in the dtype of what is learned."""
        return Graph.of(self.graph.module, self.graph.config, np.float32)

    @property
    def specs(self) -> Mapping[str, ArraySpec]:
        """Every weight; the table of ids is none."""
        found = zip(self.whole.names, self.whole.specs, strict=True)
        return {name: spec for name, spec in found if isinstance(spec, ArraySpec) and name != VOCABULARY}

    @property
    def tapped(self) -> tuple[int, ...]:
        """A low, a middle and a high layer."""
        return self.graph.config.tapped

    @property
    def depth(self) -> int:
        """How far it is unrolled."""
        return DEPTH

    @property
    def vocabulary(self) -> np.ndarray | None:
        """The target's first ids, if not all."""
        config = self.graph.config
        return np.arange(config.draft_vocab_size) if config.draft_vocab_size < config.vocab_size else None

    def begin(self) -> Weights:
        """Drawn weights."""
        drawn: Any = random_weights(self.whole, self.seed, self.placement.mesh, self.placement.rules)
        return {name: drawn[name] for name in self.specs}

    def hidden(self, weights: Weights, lesson: Lesson) -> tuple[Float[Array, "tokens embed"], ...]:
        """The head's hidden states 0, 1, ... tokens ahead of each place."""
        model, target, positions = self._bound(weights), self._target(lesson.leaves), lesson.context.positions
        vectors = target.embedding(lesson.tokens, self.placement)
        fused = model.fuse(lesson.features, self.placement)
        state = jnp.where((positions > 0)[:, None], jnp.roll(fused, 1, axis=0), 0)
        found, keys = [], list[Keys]()
        for ahead in range(DEPTH):
            state = self._layer(model, jnp.roll(vectors, -ahead, axis=0), state, keys, lesson)
            found.append(state)
        return tuple(found)

    def head(self, weights: Weights, hidden: Float[Array, "places embed"], leaves: Leaves) -> Float[Array, "places vocab"]:
        """Logits over the draft vocabulary."""
        return self._bound(weights).head(hidden, self.placement)

    def save(self, folder: Path, weights: Weights) -> dict[str, dict[str, str]]:
        """A folder in the layout of public heads, in bfloat16, beside the target's tokenizer."""
        config, named = self.graph.config, self.vocabulary
        convert.carry(self.folder, folder, config.to_hf(self.target.config.max_positions, "bfloat16"))
        if named is None:
            return save.save(folder, self.graph, weights, np.dtype(jnp.bfloat16))
        known = np.isin(np.arange(config.vocab_size), named)
        more = [Planned("t2d", known.dtype, known.shape, lambda: iter([known]))]
        return save.save(folder, self.graph, weights | {VOCABULARY: self._offsets()}, np.dtype(jnp.bfloat16), more=more)

    def _layer(
        self, model: Any, vectors: Float[Array, "tokens embed"], state: Float[Array, "tokens embed"], keys: list[Keys], lesson: Lesson
    ) -> Float[Array, "tokens embed"]:
        """One more token ahead of every place, whose keys and values join the others."""
        positions, length, shape = lesson.context.positions, _length(lesson), self.graph.config.heads
        both = jnp.concatenate([model.token_norm(vectors), model.feature_norm(state)], axis=-1)
        qkv, ahead = model.attention.qkv(both, self.placement), len(keys)
        table = rope_table(positions + ahead, jnp.asarray(self.graph.config.rope.frequencies(shape.head_dim)), 1.0)
        q = rotate(qkv[:, :, : shape.group].reshape(len(state), shape.heads, shape.head_dim), table)
        keys.append(Keys(rotate(qkv[:, :, -2], table), qkv[:, :, -1]))
        grouped = q.reshape(-1, shape.kv_heads, shape.group, shape.head_dim)
        mixed = jax.checkpoint(attend, static_argnums=3)(grouped, keys, positions, length)
        x = state + model.attention.out(mixed, self.placement)
        return x + model.mlp(model.mlp_norm(x), self.placement)

    def _bound(self, weights: Weights) -> Any:
        held = {VOCABULARY: self._offsets()} if self.vocabulary is not None else {}
        cast = {name: values.astype(self.graph.dtype) for name, values in weights.items()}
        return self.graph.bind([(cast | held)[name] for name in self.graph.names])

    def _target(self, leaves: Leaves) -> Any:
        return self.target.bind(leaves)

    def _offsets(self) -> Int[Array, " drafts"]:
        return jnp.zeros(self.graph.config.draft_vocab_size, jnp.int32)


def attend(
    q: Float[Array, "tokens kv_heads group head_dim"], keys: Sequence[Keys], positions: Int[Array, " tokens"], length: int
) -> Float[Array, "tokens kv_heads group head_dim"]:
    """Each place's query against the first keys of its text up to the place, and the place's own among the others."""
    first, *others = (Keys(*(values.reshape(-1, length, *values.shape[1:]) for values in pair)) for pair in keys)
    rows = q.reshape(-1, length, *q.shape[1:])
    at = jnp.arange(length, dtype=jnp.int32)
    begun = at[None] - jnp.maximum(positions.reshape(-1, length), 0)
    seen = (at[None, None] <= at[None, :, None]) & (at[None, None] >= begun[:, :, None])
    scores = jnp.einsum("rtkgh,rskh->rkgts", rows, first.k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    own = [jnp.einsum("rtkgh,rtkh->rkgt", rows, other.k, preferred_element_type=jnp.float32)[..., None] for other in others]
    shares = jax.nn.softmax(jnp.concatenate([scores, *own], axis=-1) * q.shape[-1] ** -0.5, axis=-1).astype(q.dtype)
    mixed = jnp.einsum("rkgts,rskh->rtkgh", shares[..., :length], first.v)
    for number, other in enumerate(others):
        mixed += jnp.einsum("rkgt,rtkh->rtkgh", shares[..., length + number], other.v)
    return mixed.reshape(q.shape)


def student(name: str, teacher: Teacher, seed: int) -> EagleHead:
    """The head that fits the target.

    Raises:
        ConfigError: a target that no head is made up for.
    """
    config = eagle.Config.beside(teacher.graph.config)
    placement = Placement(teacher.placement.mesh, teacher.placement.rules, "xla")  # other kernels have no gradient
    return EagleHead(Graph.of(eagle, config, teacher.graph.dtype), teacher.graph, placement, teacher.folder, seed)


def _length(lesson: Lesson) -> int:
    metadata = lesson.context.metadata
    if not isinstance(metadata, Sequences):
        raise ConfigError("a head learns from whole texts, not from pages")
    return metadata.length
