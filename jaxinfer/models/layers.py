"""The layers that model files are put together from, as Flax NNX modules whose weights are described before they exist.

A layer's constructor writes down an `ArraySpec` for each weight; no array is made. `graph.py` reads the descriptions off, and inside a
trace puts the real arrays in their places. Activations are packed tokens [tokens, embed] without a batch dimension: replicated over the
mesh axis `tensor`, sharded over `data`. Weights keep the contracted dimensions last ([out.., in..]), and a projection's output dimensions
are those that attention and MLP work on, so nothing is resharded between matmuls: tensor parallelism costs one all-reduce after the
attention and one after the MLP. Layers know neither checkpoints nor quantisation schemes nor requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32

from jaxinfer.models.rope import Rope
from jaxinfer.quant.matmul import sharded_matmul
from jaxinfer.sharding import DEFAULT_RULES, ArraySpec, Rules, constrain
from pallas_kernels import (
    AttentionSpec,
    KVLayout,
    PagedMetadata,
    PagedResult,
    Pool,
    SegmentIds,
    code_dtype,
    flash_attention,
    kv_layout,
    paged_attention,
    rms_norm,
)
from pallas_kernels.attention import rope_table, rotate

QUERIES = 256  # of a row, whose scores exist at once where a gradient is taken


@dataclass(frozen=True)
class Placement:
    """Static, hashable: where a program runs. implementation names the kernels ("auto", "xla", "reference", ...)."""

    mesh: Mesh
    rules: Rules = DEFAULT_RULES
    implementation: str = "auto"


class Sequences(NamedTuple):
    """In the place of `PagedMetadata`: the packed tokens are rows of `length` tokens, in each whole texts side by side, each beginning at
    position 0. Attention goes by these texts, pools are handed through as they are, and everything can be differentiated."""

    length: int


@dataclass(frozen=True)
class StepContext:
    """What every layer of one step reads. Lives inside a trace only, so it is not a pytree.

    positions: -1 marks padding. With a data axis each replica's tokens, rows and pages are adjacent, and `metadata` (decode_rows too)
    is written from the replica's own point of view: token and page indices count within its share. tapped: see `residual.through`.
    """

    positions: Int32[Array, "tokens"]
    metadata: PagedMetadata | Sequences
    placement: Placement
    tapped: tuple[int, ...] = ()

    @property
    def counters(self) -> Any:
        """The program's, for kernels that count (`pallas_kernels.shared_counters`)."""
        return None if isinstance(self.metadata, Sequences) else self.metadata.counters


class Dim(NamedTuple):
    """One dimension of a weight: its size and its logical axis (None: never sharded)."""

    size: int
    axis: str | None = None


class AttentionResult(NamedTuple):
    """What attention adds to the residual stream, and its pool with this step's keys and values."""

    hidden: Float[Array, "tokens embed"]
    kv: Pool


class MixResult(NamedTuple):
    """Values weighted by attention, of each query head, and the pool with this step's keys and values."""

    hidden: Float[Array, "tokens kv_heads group head_dim"]
    kv: Pool


def describe(dims: Sequence[Dim], dtype: np.dtype, *, contracting: int = 0) -> nnx.Param[Any]:
    """A weight that is not there yet. contracting: how many trailing dimensions a matmul sums over; 0 keeps it out of quantisation."""
    spec = ArraySpec(tuple(dim.size for dim in dims), np.dtype(dtype), tuple(dim.axis for dim in dims))
    return nnx.Param(jax.ShapeDtypeStruct(spec.shape, spec.dtype), spec=spec, contracting=contracting)


class Projection(nnx.Module):
    """A dense layer from the dimensions `into` to the dimensions `out`: weight [out.., into..], optional bias [out..]."""

    def __init__(self, out: Sequence[Dim], into: Sequence[Dim], dtype: np.dtype, *, bias: bool = False) -> None:
        self.weight = describe([*out, *into], dtype, contracting=len(into))
        self.bias = describe(out, dtype) if bias else None

    def __call__(self, x: Float[Array, "tokens *into"], placement: Placement) -> Float[Array, "tokens *out"]:
        """x @ weight.T + bias in x's dtype, summed in float32; the weight may be quantised."""
        y = project(x, self.weight, placement, out_dtype=x.dtype)
        return y if self.bias is None else y + self.bias.get_value()[None]


def project(
    x: Float[Array, "tokens *into"], weight: nnx.Param[Any], placement: Placement, *, out_dtype: np.dtype
) -> Float[Array, "tokens *out"]:
    """x times a described weight, bound to an array or a quantised one, each device with its shard."""
    return sharded_matmul(
        x,
        weight.get_value(),
        weight.spec.axes,
        mesh=placement.mesh,
        rules=placement.rules,
        out_dtype=out_dtype,
        implementation=placement.implementation,
    )


class RMSNorm(nnx.Module):
    """Root mean square normalisation (Zhang and Sennrich, arXiv 1910.07467), computed in float32.

    offset: what is added to the weight; with 1 (Gemma) a weight of zeros leaves x as it is, and the product is rounded once."""

    def __init__(self, size: int, epsilon: float, dtype: np.dtype, *, offset: float = 0.0) -> None:
        self.weight = describe([Dim(size, "embed")], dtype)
        self.epsilon = epsilon
        self.offset = offset

    def __call__(self, x: Float[Array, "tokens *heads features"]) -> Float[Array, "tokens *heads features"]:
        """x / rms(x) * (weight + offset) in x's dtype, for each token (and head)."""
        return rms_norm(x, self.weight.get_value(), epsilon=self.epsilon, offset=self.offset)


class Embedding(nnx.Module):
    """The table of token vectors [vocab, embed]; tied models use it as the head too. scale: what vectors are multiplied by."""

    def __init__(self, vocab: int, embed: int, dtype: np.dtype, *, scale: float = 1.0) -> None:
        self.weight = describe([Dim(vocab, "vocab"), Dim(embed, "embed")], dtype)
        self.scale = scale

    def __call__(self, tokens: Int32[Array, "tokens"], placement: Placement) -> Float[Array, "tokens embed"]:
        """Vectors of token ids; ids must be in range."""
        vectors = jnp.take(self.weight.get_value(), tokens, axis=0, mode="clip")
        vectors = vectors if self.scale == 1.0 else vectors * jnp.asarray(self.scale, vectors.dtype)
        return constrain(vectors, ("tokens", "embed"), placement.mesh, placement.rules)


class Head(nnx.Module):
    """From hidden states to logits, with its own weight [vocab, embed] or an embedding's."""

    def __init__(self, vocab: int, embed: int, dtype: np.dtype) -> None:
        self.weight = describe([Dim(vocab, "vocab"), Dim(embed, "embed")], dtype, contracting=1)

    def __call__(self, hidden: Float[Array, "rows embed"], placement: Placement) -> Float[Array, "rows vocab"]:
        """Logits in float32."""
        return logits(hidden, self.weight, placement)


def logits(hidden: Float[Array, "rows embed"], weight: nnx.Param[Any], placement: Placement) -> Float[Array, "rows vocab"]:
    """Float32 logits of hidden states, whole on every device of the tensor axis."""
    out = project(hidden, weight, placement, out_dtype=np.dtype(np.float32))
    return constrain(out, ("rows", None), placement.mesh, placement.rules)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU in its tanh form (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return jax.nn.gelu(x, approximate=True)


class GatedMLP(nnx.Module):
    """A gated MLP (Shazeer, arXiv 2002.05202): down(activation(gate(x)) * up(x)), gate and up as one matmul; SwiGLU by default."""

    def __init__(
        self, embed: int, mlp: int, dtype: np.dtype, *, bias: bool = False, activation: Callable[[Array], Array] = jax.nn.silu
    ) -> None:
        self.gate_up = Projection([Dim(2), Dim(mlp, "mlp")], [Dim(embed, "embed")], dtype, bias=bias)
        self.down = Projection([Dim(embed, "embed")], [Dim(mlp, "mlp")], dtype, bias=bias)
        self.activation = activation

    def __call__(self, x: Float[Array, "tokens embed"], placement: Placement) -> Float[Array, "tokens embed"]:
        """The MLP's contribution to the residual stream."""
        return self.down(gated(self.gate_up(x, placement), self.activation), placement)


def gated(x: Float[Array, "tokens 2 mlp"], activation: Callable[[Array], Array]) -> Float[Array, "tokens mlp"]:
    """activation(first half) * second half."""
    return activation(x[:, 0]) * x[:, 1]


class HeadShape(NamedTuple):
    """Query heads, key-value heads (a divisor of them) and the features of each."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads


class HeadNorm(NamedTuple):
    """RMSNorm of each query and key head, before rope: see `RMSNorm`."""

    epsilon: float
    offset: float = 0.0


@dataclass(frozen=True)
class AttentionForm:
    """In what an attention layer differs from Llama's: what q.k is multiplied by (None: head_dim ** -0.5), the newest keys that a token
    sees, its own included (None: all), norms of heads (None: none)."""

    scale: float | None = None
    window: int | None = None
    norm: HeadNorm | None = None


PLAIN = AttentionForm()


class Attention(nnx.Module):
    """Grouped-query attention over the paged cache (Ainslie et al., arXiv 2305.13245); q, k and v of a group are one weight's rows."""

    def __init__(
        self, embed: int, shape: HeadShape, rope: Rope, dtype: np.dtype, *, bias: bool = False, form: AttentionForm = PLAIN
    ) -> None:
        kv_heads, head_dim = Dim(shape.kv_heads, "kv_heads"), Dim(shape.head_dim)
        self.qkv = Projection([kv_heads, Dim(shape.group + 2), head_dim], [Dim(embed, "embed")], dtype, bias=bias)
        self.out = Projection([Dim(embed, "embed")], [kv_heads, Dim(shape.group), head_dim], dtype, bias=bias)
        norms = [None if form.norm is None else RMSNorm(shape.head_dim, form.norm.epsilon, dtype, offset=form.norm.offset) for _ in "qk"]
        self.q_norm, self.k_norm = norms
        self.shape = shape
        self.rope = rope
        self.spec = AttentionSpec(scale=form.scale or shape.head_dim**-0.5, window=form.window)

    def __call__(self, x: Float[Array, "tokens embed"], kv: Pool, context: StepContext) -> AttentionResult:
        """The attention's contribution to the residual stream. Writes this step's keys and values into kv, which the caller donates."""
        mixed = self.mix(self.qkv(x, context.placement), kv, context)
        return AttentionResult(self.out(mixed.hidden, context.placement), mixed.kv)

    def mix(self, qkv: Float[Array, "tokens kv_heads lines head_dim"], kv: Pool, context: StepContext) -> MixResult:
        """All between the two projections."""
        shape, tokens = self.shape, qkv.shape[0]
        q = qkv[:, :, : shape.group].reshape(tokens, shape.heads, shape.head_dim)
        k = qkv[:, :, -2]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        result = attend(q, k, qkv[:, :, -1], kv, context, spec=self.spec, rope=self.rope)
        return MixResult(result.out.reshape(tokens, shape.kv_heads, shape.group, shape.head_dim), result.kv)


# Layers of one shape share one trace of the op, most of what tracing a model costs; XLA inlines the calls.
_traced_once = jax.jit(paged_attention, static_argnames=("spec", "implementation"))


def attend(
    q: Float[Array, "tokens heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    kv: Pool,
    context: StepContext,
    *,
    spec: AttentionSpec,
    rope: Rope,
) -> PagedResult:
    """Paged attention on every device of the mesh over its own tokens, pages and heads (all heads where kv_heads does not divide), or
    attention within `Sequences`.

    Raises:
        ValueError: tokens, rows or pages that do not divide by the data axis: page ids would mean another replica's pages.
    """
    placement, metadata = context.placement, context.metadata
    frequencies = jnp.asarray(rope.frequencies(q.shape[2]))
    if isinstance(metadata, Sequences):
        within = partial(_within_sequences, length=metadata.length, spec=spec, rope=frequencies)
        of_tokens = PartitionSpec(placement.rules.mesh_axis("tokens"), _heads_axis(k.shape[1], placement), None)
        inputs = (of_tokens, of_tokens, of_tokens, PartitionSpec(of_tokens[0]))
        sharded = jax.shard_map(within, mesh=placement.mesh, in_specs=inputs, out_specs=of_tokens, check_vma=False)
        return PagedResult((within if placement.mesh.size == 1 else sharded)(q, k, v, context.positions), kv)

    def local(q: Array, k: Array, v: Array, positions: Array, kv: Pool, metadata: PagedMetadata) -> PagedResult:
        return _traced_once(q, k, v, positions, kv, metadata, spec=spec, rope=frequencies, implementation=placement.implementation)

    if placement.mesh.size == 1:
        return local(q, k, v, context.positions, kv, metadata)
    layout = kv_layout(placement.implementation, kv_heads=k.shape[1], head_dim=k.shape[2], dtype=k.dtype, kv_dtype=code_dtype(kv))
    data = placement.rules.mesh_axis("tokens")
    pages = jax.tree.leaves(jax.tree.map(lambda array, pool: pool.shape[array.axes().index("pages")], layout, kv))[0]
    _check_divides(placement.mesh.shape.get(data, 1), q.shape[0], metadata, pages)
    heads = _heads_axis(k.shape[1], placement)
    of_tokens, of_pool = PartitionSpec(data, heads, None), jax.tree.map(lambda array: _pool_partition(array, heads, data), layout)
    inputs = (of_tokens, of_tokens, of_tokens, PartitionSpec(data), of_pool, PartitionSpec(data))
    outputs = PagedResult._make((of_tokens, of_pool))
    sharded = jax.shard_map(local, mesh=placement.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
    return sharded(q, k, v, context.positions, kv, metadata)


def _within_sequences(
    q: Float[Array, "tokens heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    positions: Int32[Array, "tokens"],
    *,
    length: int,
    spec: AttentionSpec,
    rope: Float[Array, "half_rotary"],
) -> Float[Array, "tokens heads head_dim"]:
    """What paged attention computes for whole texts, in float32 and with a gradient: scores exist for a few queries of all rows at once,
    and once more when the gradient is taken."""
    table = rope_table(positions, rope, spec.rope_scale)
    wide = [x.astype(jnp.float32).reshape(-1, length, *x.shape[1:]) for x in (rotate(q, table), rotate(k, table), v)]
    texts = jnp.cumsum(positions.reshape(-1, length) == 0, axis=1, dtype=jnp.int32)
    block = max(size for size in range(1, min(QUERIES, length) + 1) if length % size == 0)

    def attend_block(start: Int32[Array, ""]) -> Float[Array, "rows block heads head_dim"]:
        own, ids = (jax.lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in (wide[0], texts))
        offsets = jnp.full(ids.shape[:1], start)
        return flash_attention(
            own, wide[1], wide[2], spec=spec, causal="causal", query_offsets=offsets, segment_ids=SegmentIds(ids, texts),
            implementation="reference",
        )  # fmt: skip

    blocks = jax.lax.map(jax.checkpoint(attend_block), jnp.arange(0, length, block, dtype=jnp.int32))
    return jnp.swapaxes(blocks, 0, 1).reshape(q.shape).astype(q.dtype)


def kv_spec(layout: KVLayout, pages: int, page_size: int) -> ArraySpec:
    """One array of a layer's pool of `pages` pages (all replicas' together, each with its guard page)."""
    return ArraySpec(layout.shape(pages, page_size), np.dtype(layout.dtype), layout.axes())


def _heads_axis(kv_heads: int, placement: Placement) -> str | None:
    axis = placement.rules.mesh_axis("kv_heads")
    return axis if axis is not None and kv_heads % placement.mesh.shape[axis] == 0 else None


def _pool_partition(layout: KVLayout, heads: str | None, data: str | None) -> PartitionSpec:
    return PartitionSpec(*({"pages": data, "kv_heads": heads}.get(axis or "") for axis in layout.axes()))


def _check_divides(replicas: int, tokens: int, metadata: PagedMetadata, pages: int) -> None:
    rows = metadata.kv_lengths.shape[0]
    if tokens % replicas or rows % replicas or pages % replicas:
        raise ValueError(f"{tokens} tokens, {rows} rows and {pages} pages must all divide by the {replicas} replicas of the data axis")
