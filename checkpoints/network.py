"""The Llama network that is trained, in Flax NNX: float32 weights, bfloat16 arithmetic, attributes named as Hugging Face names tensors.

Life of the data: `make` describes a network and draws its weights; they live outside the modules as a flat dict {tensor name: array},
and `hidden_states` puts them back in for one call. What this file does NOT know: losses, caches, files.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from checkpoints.export import Shape

Params = dict[str, jax.Array]


class Weight(nnx.Module):
    """One float32 matrix [out, in] (or vector) called `weight`."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, ...], scale: float) -> None:
        """Draw from a normal distribution of standard deviation `scale`; a vector starts at one."""
        draw = np.ones(size) if len(size) == 1 else rng.normal(0.0, scale, size)
        self.weight = nnx.Param(jnp.asarray(draw.astype(np.float32)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiply [..., in] by the matrix into [..., out], in x's dtype."""
        return x @ self.weight[...].astype(x.dtype).T


class RMSNorm(Weight):
    """Division by the root mean square, computed in float32, times a learned scale."""

    def __init__(self, rng: np.random.Generator, shape: Shape) -> None:
        """A scale of one for every hidden dimension."""
        super().__init__(rng, (shape.hidden_size,), 1.0)
        self.epsilon = shape.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise the last axis; the result has x's dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.weight[...]).astype(x.dtype)


def rope(x: jax.Array, theta: float) -> jax.Array:
    """Rotate [rows, length, heads, head_dim] by position, halves paired as Hugging Face pairs them."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    left, right = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention with grouped keys and values."""

    def __init__(self, rng: np.random.Generator, shape: Shape, implementation: str) -> None:
        """`implementation` is what jax.nn.dot_product_attention takes: 'xla' or 'cudnn'."""
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = Weight(rng, (queries, shape.hidden_size), 0.02)
        self.k_proj = Weight(rng, (keys, shape.hidden_size), 0.02)
        self.v_proj = Weight(rng, (keys, shape.hidden_size), 0.02)
        self.o_proj = Weight(rng, (shape.hidden_size, queries), 0.02 / (2 * shape.num_hidden_layers) ** 0.5)
        self.shape, self.implementation = shape, implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attend within each row of [rows, length, hidden]."""
        rows, length, _ = x.shape
        q, k, v = (projection(x).reshape(rows, length, -1, self.shape.head_dim) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rope(q, self.shape.rope_theta), rope(k, self.shape.rope_theta)
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=self.implementation)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return self.o_proj(out.reshape(rows, length, -1))


class MLP(nnx.Module):
    """The gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, rng: np.random.Generator, shape: Shape) -> None:
        """Three matrices; the last starts small, as every write into the residual stream does."""
        self.gate_proj = Weight(rng, (shape.intermediate_size, shape.hidden_size), 0.02)
        self.up_proj = Weight(rng, (shape.intermediate_size, shape.hidden_size), 0.02)
        self.down_proj = Weight(rng, (shape.hidden_size, shape.intermediate_size), 0.02 / (2 * shape.num_hidden_layers) ** 0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform [..., hidden]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, rng: np.random.Generator, shape: Shape, implementation: str) -> None:
        """Named as Hugging Face's LlamaDecoderLayer names its parts."""
        self.input_layernorm = RMSNorm(rng, shape)
        self.self_attn = Attention(rng, shape, implementation)
        self.post_attention_layernorm = RMSNorm(rng, shape)
        self.mlp = MLP(rng, shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform [rows, length, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nnx.Module):
    """Embedding, blocks, final norm; the head is the embedding."""

    def __init__(self, rng: np.random.Generator, shape: Shape, implementation: str) -> None:
        """Named as Hugging Face's LlamaModel names its parts."""
        self.embed_tokens = Weight(rng, (shape.vocab_size, shape.hidden_size), 0.02)
        self.layers = nnx.List([Block(rng, shape, implementation) for _ in range(shape.num_hidden_layers)])
        self.norm = RMSNorm(rng, shape)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Hidden states [rows, length, hidden] in bfloat16 for token ids [rows, length]."""
        x = self.embed_tokens.weight[...][tokens].astype(jnp.bfloat16)  # this order: its gradient is summed in float32
        for block in self.layers:
            x = block(x)
        return self.norm(x)


@dataclass(frozen=True)
class Network:
    """The description of a network; its weights travel beside it as a flat dict."""

    shape: Shape
    graph: Any
    paths: tuple[tuple[Any, ...], ...]

    def hidden_states(self, params: Params, tokens: jax.Array) -> jax.Array:
        """Final hidden states [rows, length, hidden] in bfloat16 for token ids [rows, length]."""
        state = nnx.from_flat_state([(path, nnx.Param(params[tensor_name(path)])) for path in self.paths])
        return nnx.merge(self.graph, state)(tokens)

    def logits(self, params: Params, hidden: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Logits [..., vocabulary] of hidden states [..., hidden], rounded to `dtype` (bfloat16 keeps a training step small)."""
        head = params["model.embed_tokens.weight"].astype(hidden.dtype)
        return jnp.einsum("...h,vh->...v", hidden, head, preferred_element_type=dtype)


def tensor_name(path: tuple[Any, ...]) -> str:
    """Hugging Face's name of the tensor at a path of attributes."""
    return "model." + ".".join(str(part) for part in path)


def make(shape: Shape, seed: int, implementation: str) -> tuple[Network, Params]:
    """A network and its first weights: float32, under Hugging Face's names."""
    graph, state = nnx.split(Llama(np.random.default_rng(seed), shape, implementation))
    flat = list(nnx.to_flat_state(state))
    params = {tensor_name(path): jnp.asarray(variable[...]) for path, variable in flat}
    return Network(shape, graph, tuple(path for path, _ in flat)), params
