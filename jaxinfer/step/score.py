"""What the model thought of a prompt: the log probability of every token given those before it.

A prompt's chunk leaves hidden states; `Score` turns those into log probabilities of the tokens that come next, which the host knows and
sends along (`pack_targets`): so a chunk's last token is scored with the first token of the next chunk. The vocabulary's numbers exist for
one block of tokens at a time. It runs only in steps where a row asks for it. This file does not know how scores are collected.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.batch import Row
from jaxinfer.models.graph import Graph
from jaxinfer.models.layers import Placement
from jaxinfer.sampling import pytree, reported
from jaxinfer.step.inputs import Packed, Shapes

BLOCK = 64
NO_TARGET = -1


@pytree
@dataclass(frozen=True)
class Scored:
    """For each prefill token of a step, replicas one after another, what the model thought of the next token of its prompt.

    logprob: nats, under the unmodified logits. rank: how many tokens were at least as likely. Zeros where there was no target.
    """

    logprob: Float[Array, " tokens"]
    rank: Int[Array, " tokens"]
    top_tokens: Int[Array, "tokens top"]
    top_logprobs: Float[Array, "tokens top"]


@dataclass(frozen=True)
class Score:
    """Everything static about scoring a bucket's prefill tokens."""

    graph: Graph
    shapes: Shapes
    placement: Placement

    def __call__(
        self, leaves: tuple[Array, ...], hidden: Float[Array, "tokens embed"], targets: Int[Array, "replicas prefill_tokens"]
    ) -> Scored:
        """Score the tokens that have a target; blocks without any are skipped at run time."""
        bucket, replicas = self.shapes.bucket, self.shapes.replicas
        prefill = hidden.reshape(replicas, bucket.tokens, -1)[:, bucket.decode_size :]
        scored = jax.lax.map(lambda block: self._block(leaves, *block), (_blocks(prefill), _blocks(targets[..., None], NO_TARGET)))
        return jax.tree.map(lambda values: _joined(values, replicas, bucket.prefill_tokens), scored)

    def _block(
        self, leaves: tuple[Array, ...], hidden: Float[Array, "replicas block embed"], targets: Int[Array, "replicas block 1"]
    ) -> Scored:
        model: Any = self.graph.bind(leaves)
        target, vocab = targets.reshape(-1), self.graph.config.vocab_size
        rows = hidden.reshape(target.shape[0], -1)
        scored = jax.lax.cond(
            jnp.any(target != NO_TARGET), lambda: score(model.head(rows, self.placement), target), lambda: _nothing(len(target), vocab)
        )
        return jax.tree.map(lambda values: values.reshape(*targets.shape[:2], *values.shape[1:]), scored)


def score(logits: Float[Array, "tokens vocab"], target: Int[Array, " tokens"]) -> Scored:
    """Log probability and rank of one target per row, and the likeliest tokens, most likely first."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    logprob = jnp.take_along_axis(logprobs, jnp.maximum(target, 0)[:, None], axis=-1)
    rank = jnp.sum(logprobs >= logprob, axis=-1, dtype=jnp.int32)
    top_logprobs, top_tokens = jax.lax.top_k(logprobs, reported(logits.shape[-1]))
    return Scored(logprob[:, 0], rank, top_tokens.astype(jnp.int32), top_logprobs)


def wanted(row: Row) -> bool:
    """Whether a row holds tokens of a prompt whose successors are to be scored."""
    return row.request.params.prompt_logprobs is not None and row.start + 1 < len(row.request.prompt)


def places(packed: Packed) -> Iterator[tuple[Row, int]]:
    """The rows to be scored, each with the index of its first token among the prefill tokens of all replicas."""
    bucket = packed.shapes.bucket
    filled = [replica * bucket.prefill_tokens for replica in range(packed.shapes.replicas)]
    for index, row in packed.rows:
        if index % bucket.rows < bucket.decode_rows:
            continue
        if wanted(row):
            yield row, filled[row.replica]
        filled[row.replica] += len(row.tokens)


def pack_targets(packed: Packed) -> np.ndarray | None:
    """The next token of each prefill token to be scored, [replicas, prefill tokens]; None if no row asks."""
    targets = np.full((packed.shapes.replicas, packed.shapes.bucket.prefill_tokens), NO_TARGET, np.int32)
    asked = list(places(packed))
    for row, at in asked:
        following = row.request.prompt[row.start + 1 : row.kv_length + 1]
        targets.reshape(-1)[at : at + len(following)] = following
    return targets if asked else None


def _nothing(tokens: int, vocab: int) -> Scored:
    top = (tokens, reported(vocab))
    return Scored(jnp.zeros(tokens, jnp.float32), jnp.zeros(tokens, jnp.int32), jnp.zeros(top, jnp.int32), jnp.zeros(top, jnp.float32))


def _blocks(values: Array, fill: int = 0) -> Array:
    """[replicas, tokens, ...] -> [blocks, replicas, block, ...], filled up to whole blocks."""
    replicas, tokens, *rest = values.shape
    size = min(BLOCK, tokens)
    filled = jnp.pad(values, ((0, 0), (0, -tokens % size), (0, 0)), constant_values=fill)
    return jnp.swapaxes(filled.reshape(replicas, -1, size, *rest), 0, 1)


def _joined(values: Array, replicas: int, tokens: int) -> Array:
    """[blocks, replicas, block, ...] -> [replicas * tokens, ...]."""
    rest = values.shape[3:]
    return jnp.swapaxes(values, 0, 1).reshape(replicas, -1, *rest)[:, :tokens].reshape(replicas * tokens, *rest)
