"""The Llama family as Hugging Face configures it: grouped-query attention, rope with Llama 3's or linear scaling, SwiGLU, RMSNorm.

Packed tokens go through embedding, layers and final norm; `head` turns the hidden states of the rows that sample into logits. The
file says what the weights are called in a checkpoint and nothing about files, meshes or quantisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxinfer.config import ConfigError
from jaxinfer.models.hf import Fields
from jaxinfer.models.layers import (
    PLAIN,
    Attention,
    AttentionForm,
    Embedding,
    GatedMLP,
    Head,
    HeadShape,
    Placement,
    RMSNorm,
    StepContext,
    logits,
)
from jaxinfer.models.residual import LayerResult, Link, ModelOutput, Stream, through
from jaxinfer.models.rope import Rope
from jaxinfer.models.weights import Joined, Part, Transform
from pallas_kernels import Pool


@dataclass(frozen=True)
class Config:
    """The model's shape. biases: on the four attention projections, on the three of the MLP."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: HeadShape
    max_positions: int
    rms_norm_epsilon: float = 1e-6
    rope: Rope = Rope()
    tied_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Read a config.json.

        Raises:
            ConfigError: a field that is missing, out of range, or asks for something that is not implemented.
        """
        fields = Fields(config)
        fields.choice("hidden_act", ("silu",), default="silu")
        read = cls(**usual(fields), mlp_bias=fields.flag("mlp_bias", default=False))
        fields.finish()
        return read

    @property
    def attention_shapes(self) -> tuple[HeadShape, ...]:
        """The heads of each layer: what its KV pool is made for."""
        return (self.heads,) * self.layers

    @property
    def attention_windows(self) -> tuple[int | None, ...]:
        """How many of the newest keys a token sees in each layer, its own included; None: all."""
        return (None,) * self.layers


class Block(nnx.Module):
    """One layer: attention and MLP, each normalised before and added to the residual stream after."""

    def __init__(self, config: Config, dtype: np.dtype, form: AttentionForm = PLAIN) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_epsilon, dtype)
        self.attention = Attention(config.hidden_size, config.heads, config.rope, dtype, bias=config.attention_bias, form=form)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_epsilon, dtype)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, dtype, bias=config.mlp_bias)

    def __call__(self, stream: Stream, kv: Pool, context: StepContext) -> LayerResult:
        """The residual stream after this layer. Writes to kv, which the caller donates."""
        before = stream.projected(self.attention_norm, self.attention.qkv, context.placement)
        mixed = self.attention.mix(before.value, kv, context)
        return LayerResult(self.feed(before.stream.then(Link(self.attention.out), of=mixed.hidden), context), mixed.kv)

    def feed(self, stream: Stream, context: StepContext) -> Stream:
        """The residual stream after the MLP."""
        return stream.then(Link(self.mlp.gate_up, self.mlp_norm, self.mlp.activation), Link(self.mlp.down))


class Model(nnx.Module):
    """The whole model, its weights described (see layers.py) or, inside a trace, bound (see graph.py)."""

    BLOCK: type[Block] = Block  # of a family that differs inside its layers

    def __init__(self, config: Config, dtype: np.dtype) -> None:
        self.embedding = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = nnx.List([self.BLOCK(config, dtype) for _ in range(config.layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_epsilon, dtype)
        self.lm_head = None if config.tied_embeddings else Head(config.vocab_size, config.hidden_size, dtype)

    def __call__(self, tokens: Int32[Array, "tokens"], kv: tuple[Pool, ...], context: StepContext) -> ModelOutput:
        """Run one step's packed tokens; kv holds one pool per layer and is donated by the caller."""
        return through(self.layers, self.embedding(tokens, context.placement), kv, context, norm=self.norm)

    def head(self, hidden: Float[Array, "rows embed"], placement: Placement) -> Float[Array, "rows vocab"]:
        """Float32 logits of hidden states that `__call__` returned."""
        if self.lm_head is None:
            return logits(hidden, self.embedding.weight, placement)
        return self.lm_head(hidden, placement)


def usual(fields: Fields) -> dict[str, Any]:
    """What most families write into config.json in the same way, by the names of `Config`.

    Raises:
        ConfigError: a field that is missing, out of range, or asks for something that is not implemented.
    """
    hidden = fields.integer("hidden_size")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size"),
        "layers": fields.integer("num_hidden_layers"),
        "heads": head_shape(fields, hidden),
        "max_positions": fields.integer("max_position_embeddings", default=2048),
        "rms_norm_epsilon": fields.number("rms_norm_eps", default=Config.rms_norm_epsilon),
        "rope": Rope.from_hf(fields),
        "tied_embeddings": fields.flag("tie_word_embeddings", default=False),
        "attention_bias": fields.flag("attention_bias", default=False),
    }


def head_shape(fields: Fields, hidden: int) -> HeadShape:
    """Query heads, key-value heads and features of each, in a model of so many features.

    Raises:
        ConfigError: they do not fit together.
    """
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise ConfigError(f"{fields.where}: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    if fields.values.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"{fields.where} has no head_dim, and hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = fields.integer("head_dim", default=hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"{fields.where}: head_dim {head_dim} must be even: rope turns pairs of features")
    return HeadShape(heads, kv_heads, head_dim)


def ignored(config: Config) -> tuple[str, ...]:
    """Patterns of tensors that a checkpoint may hold and that are not needed: they are computed, or tied to another one."""
    return ("*.rotary_emb.inv_freq", "lm_head.weight") if config.tied_embeddings else ("*.rotary_emb.inv_freq",)


def _query_rows(config: Any) -> tuple[tuple[int, ...], ...]:
    return ((config.heads.kv_heads, config.heads.group, config.heads.head_dim),)


def _kv_rows(config: Any) -> tuple[tuple[int, ...], ...]:
    return ((config.heads.kv_heads, 1, config.heads.head_dim),)


def _out_columns(config: Any) -> tuple[tuple[int, ...], ...]:
    return ((config.hidden_size,), *_query_rows(config))


def _mlp_rows(config: Any) -> tuple[tuple[int, ...], ...]:
    return ((1, config.intermediate_size),)


def projections(ours: str, theirs: str, kind: str = "weight") -> dict[str, Transform]:
    """The weights ("weight") or the biases ("bias") of a layer's projections; ours, theirs: what its names begin with."""
    attention, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
    query = Part(f"{attention}q_proj.{kind}", _query_rows)
    key, value = Part(f"{attention}k_proj.{kind}", _kv_rows), Part(f"{attention}v_proj.{kind}", _kv_rows)
    return {
        f"{ours}attention.qkv.{kind}": Joined(1, (query, key, value)),
        f"{ours}attention.out.{kind}": Part(f"{attention}o_proj.{kind}", _out_columns if kind == "weight" else None),
        f"{ours}mlp.gate_up.{kind}": Joined(0, (Part(f"{mlp}gate_proj.{kind}", _mlp_rows), Part(f"{mlp}up_proj.{kind}", _mlp_rows))),
        f"{ours}mlp.down.{kind}": Part(f"{mlp}down_proj.{kind}"),
    }


WEIGHTS: dict[str, Transform] = {
    "embedding.weight": Part("model.embed_tokens.weight"),
    "layers.*.attention_norm.weight": Part("model.layers.*.input_layernorm.weight"),
    "layers.*.mlp_norm.weight": Part("model.layers.*.post_attention_layernorm.weight"),
    "norm.weight": Part("model.norm.weight"),
    "lm_head.weight": Part("lm_head.weight"),
    **projections("layers.*.", "model.layers.*."),
    **projections("layers.*.", "model.layers.*.", "bias"),
}

# Norms, and the matrices that multiply what comes out of them: all that do, so that what a norm is multiplied by they may be divided by.
NORMS: dict[str, tuple[str, ...]] = {
    "layers.*.attention_norm.weight": ("layers.*.attention.qkv.weight",),
    "layers.*.mlp_norm.weight": ("layers.*.mlp.gate_up.weight",),
    "norm.weight": ("lm_head.weight",),
}

TINY = Config(vocab_size=128, hidden_size=64, intermediate_size=96, layers=2, heads=HeadShape(4, 2, 16), max_positions=256)
