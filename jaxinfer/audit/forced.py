"""Teacher forcing: the same texts through two models, and what each thought of every token, compared over the whole vocabulary.

Both models run the engine's own forward pass against a paged pool of their own, so a quantised KV cache is written and read as in
serving. Texts are packed into steps of one shape; one longer than a step goes through several, its keys and values staying in its pages.
Each model compiles one forward, each pair one comparison. The hidden states of a step become logits a block of tokens at a time, on the
device: of [tokens, vocab] only BLOCK rows exist at once, and only a few numbers per token reach the host. This file does not know what
the figures are used for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxinfer.audit.statistics import Trace
from jaxinfer.batch import Batch, Row
from jaxinfer.cache import kv as kv_cache
from jaxinfer.models.graph import Graph
from jaxinfer.models.layers import Placement
from jaxinfer.request import Request
from jaxinfer.sampling import pytree
from jaxinfer.step import slots as slot_state
from jaxinfer.step.buckets import Bucket, prefill_rows
from jaxinfer.step.inputs import pack
from jaxinfer.step.keys import ProgramConfig
from jaxinfer.step.program import Program

STEP = 512  # tokens of the longest step
SHORTEST_STEP = 32
BLOCK = 32  # tokens whose logits exist at once; divides every step
TOP = 3
NO_TARGET = -1
NOBODY = Request("audit", (0,))


class Text(NamedTuple):
    """Token ids, those from index `first` (at least 1) on to be scored."""

    tokens: tuple[int, ...]
    first: int


class Piece(NamedTuple):
    """Tokens start .. start + size - 1 of a text: one row of a step, with the pages that hold the text so far."""

    text: int
    start: int
    size: int
    pages: tuple[int, ...]


@pytree
@dataclass(frozen=True)
class Compared:
    """For each token of a step what two models thought of the next one; zeros where there is none to be scored. See `Trace`."""

    divergence: Float[Array, " tokens"]
    reference: Float[Array, " tokens"]
    other: Float[Array, " tokens"]
    reference_top: Int[Array, "tokens top"]
    reference_top_logprobs: Float[Array, "tokens top"]
    other_top: Int[Array, "tokens top"]
    other_top_logprobs: Float[Array, "tokens top"]


def compare(reference: Program, other: Program, texts: Sequence[Text]) -> list[Trace]:
    """Run every text through both models; one trace for each text. The models share a vocabulary and a mesh without a data axis."""
    bucket, page_size = bucket_for(texts), reference.config.pool.page_size
    longest = max(len(text.tokens) for text in texts)
    pages = 1 + bucket.prefill_rows + -(-max(longest, bucket.prefill_tokens) // page_size)
    sides = [_Side(program, bucket, pages, longest) for program in (reference, other)]
    judge = jax.jit(Compare(sides[0].config.graph, sides[1].config.graph, sides[0].config.placement, sides[1].config.placement))
    found: list[list[Compared]] = [[] for _ in texts]
    for step in steps(texts, bucket, page_size):
        targets, at = _targets(texts, step, bucket), 0
        hidden = [side.hidden(texts, step) for side in sides]
        compared = jax.device_get(judge(sides[0].leaves, hidden[0], sides[1].leaves, hidden[1], targets))
        for piece in step:
            scored = np.flatnonzero(targets[at : at + piece.size] != NO_TARGET) + at
            found[piece.text].append(jax.tree.map(lambda values, scored=scored: values[scored], compared))
            at += piece.size
    return [_trace(text, parts) for text, parts in zip(texts, found, strict=True)]


@dataclass(frozen=True)
class Compare:
    """Everything static about comparing what two models thought."""

    reference: Graph
    other: Graph
    placement: Placement
    other_placement: Placement

    def __call__(
        self, leaves: tuple[Array, ...], hidden: Float[Array, "tokens embed"], other_leaves: tuple[Array, ...],
        other_hidden: Float[Array, "tokens embed"], targets: Int[Array, " tokens"],
    ) -> Compared:  # fmt: skip
        """Compare at every token that has a target; blocks without any are skipped at run time."""
        blocks = [values.reshape(-1, BLOCK, *values.shape[1:]) for values in (hidden, other_hidden, targets)]
        compared = jax.lax.map(lambda block: self._block(leaves, other_leaves, *block), tuple(blocks))
        return jax.tree.map(lambda values: values.reshape(-1, *values.shape[2:]), compared)

    def _block(
        self, leaves: tuple[Array, ...], other_leaves: tuple[Array, ...], hidden: Float[Array, "block embed"],
        other_hidden: Float[Array, "block embed"], target: Int[Array, " block"],
    ) -> Compared:  # fmt: skip
        def work() -> Compared:
            model: Any = self.reference.bind(leaves)
            other: Any = self.other.bind(other_leaves)
            return compared(model.head(hidden, self.placement), other.head(other_hidden, self.other_placement), target)

        nothing = jax.tree.map(lambda value: jnp.zeros(value.shape, value.dtype), jax.eval_shape(work))
        return jax.lax.cond(jnp.any(target != NO_TARGET), work, lambda: nothing)


def compared(reference: Float[Array, "tokens vocab"], other: Float[Array, "tokens vocab"], target: Int[Array, " tokens"]) -> Compared:
    """What two models' logits say.

    The divergence is summed as p (log p - log q) + (q - p): the added terms sum to zero and take away what rounding of normalisers adds.
    """
    p, q = (jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1) for logits in (reference, other))
    of_p = jnp.exp(p)
    divergence = jnp.sum(jnp.where(of_p > 0, of_p * (p - q), 0.0) + (jnp.exp(q) - of_p), axis=-1)
    at = jnp.maximum(target, 0)[:, None]
    top_p, tokens_p = jax.lax.top_k(p, TOP)
    top_q, tokens_q = jax.lax.top_k(q, TOP)
    own, others = (jnp.take_along_axis(values, at, axis=-1)[:, 0] for values in (p, q))
    return Compared(jnp.maximum(divergence, 0.0), own, others, tokens_p.astype(jnp.int32), top_p, tokens_q.astype(jnp.int32), top_q)


def bucket_for(texts: Sequence[Text]) -> Bucket:
    """The one shape of all steps: a power of two that holds all texts at once, STEP if that is less."""
    total, size = sum(len(text.tokens) - 1 for text in texts), SHORTEST_STEP
    while size < min(total, STEP):
        size *= 2
    return Bucket(size, prefill_rows(size, size), 0)


def steps(texts: Sequence[Text], bucket: Bucket, page_size: int) -> Iterator[tuple[Piece, ...]]:
    """Texts, all but their last tokens, packed in order into steps. One that fills more than a step has its steps for itself."""
    waiting: list[Piece] = []
    page = 1  # page 0 is the guard page
    for number, text in enumerate(texts):
        length = len(text.tokens) - 1
        if waiting and (sum(piece.size for piece in waiting) + length > bucket.prefill_tokens or len(waiting) == bucket.prefill_rows):
            yield tuple(waiting)
            waiting, page = [], 1
        pages = tuple(range(page, page - (-length // page_size)))
        pieces = [
            Piece(number, start, min(bucket.prefill_tokens, length - start), pages) for start in range(0, length, bucket.prefill_tokens)
        ]
        if len(pieces) > 1:
            yield from ((piece,) for piece in pieces)
        else:
            waiting, page = [*waiting, *pieces], page + len(pages)
    if waiting:
        yield tuple(waiting)


class _Side:
    """One model: its weights, a small pool in its KV dtype, and its forward pass compiled for one shape."""

    def __init__(self, program: Program, bucket: Bucket, pages: int, longest: int) -> None:
        pool = replace(program.config.pool, pages=pages)
        self.config: ProgramConfig = replace(
            program.config, pool=pool, buckets=(bucket,), max_sequences=1, max_tokens=longest, draft=None
        )
        self.leaves = program.leaves
        mesh, rules = self.config.placement.mesh, self.config.placement.rules
        self._run = Program(self.config).call(bucket).lower().compile()
        self._kv: Any = kv_cache.allocate(self.config.kv_specs, mesh, rules)
        neutral = slot_state.neutral(self.config.spare_slot + 1, self.config.vocab)
        self._slots = jax.device_put(neutral, NamedSharding(mesh, PartitionSpec()))
        self._sharding = NamedSharding(mesh, PartitionSpec("data"))
        self._shapes = self.config.shapes(bucket)

    def hidden(self, texts: Sequence[Text], step: Sequence[Piece]) -> Float[Array, "tokens embed"]:
        """Hidden states of a step's tokens."""
        rows = [
            Row(NOBODY, self.config.spare_slot, it.start, texts[it.text].tokens[it.start : it.start + it.size], it.pages, samples=False)
            for it in step
        ]
        buffer = jax.device_put(pack(Batch((), tuple(rows)), self._shapes).buffer, self._sharding)
        self._kv, computed = self._run(self.leaves, self._kv, self._slots, buffer)
        return computed.hidden


def _targets(texts: Sequence[Text], step: Sequence[Piece], bucket: Bucket) -> Int[np.ndarray, " tokens"]:
    """For each token of a step the one that comes next, if that is to be scored."""
    targets, at = np.full(bucket.tokens, NO_TARGET, np.int32), 0
    for piece in step:
        tokens, first = texts[piece.text]
        for index in range(piece.start + 1, piece.start + piece.size + 1):
            if index >= first:
                targets[at + index - piece.start - 1] = tokens[index]
        at += piece.size
    return targets


def _trace(text: Text, parts: Sequence[Compared]) -> Trace:
    joined: Compared = jax.tree.map(lambda *values: np.concatenate(values), *parts)
    return Trace(
        text.first, joined.divergence, joined.reference, joined.other, joined.reference_top, joined.reference_top_logprobs,
        joined.other_top, joined.other_top_logprobs,
    )  # type: ignore[arg-type]  # fmt: skip
