"""Gemma 3 (arXiv 2503.19786), the text model, as Hugging Face configures it (`gemma3_text`).

Most layers see a window of the newest keys and turn them with a rope of their own, every sixth or so sees all. Query and key heads are
normalised before rope, attention and MLP before and after; norms multiply by one plus their weight. Token vectors are scaled by the
root of their size, the MLP's gate is a GELU. How packed tokens go through is `llama.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx

from jaxinfer.config import ConfigError
from jaxinfer.models import llama
from jaxinfer.models.hf import Fields
from jaxinfer.models.layers import (
    Attention,
    AttentionForm,
    Embedding,
    GatedMLP,
    Head,
    HeadNorm,
    HeadShape,
    RMSNorm,
    StepContext,
    gelu_tanh,
)  # fmt: skip
from jaxinfer.models.residual import LayerResult, Stream
from jaxinfer.models.rope import Rope
from jaxinfer.models.weights import Part, Transform
from pallas_kernels import Pool

KINDS = ("sliding_attention", "full_attention")

# What Hugging Face takes for fields that are not there, where it is not what others take. Published checkpoints leave some of them out.
DEFAULTS = {
    "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "rope_theta": 1e6, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Config(llama.Config):
    """The model's shape, as in `llama.Config`; rope is that of layers that see everything.

    windows: of each layer, see `attention_windows`. attention_scale: what q.k is multiplied by.
    """

    local_rope: Rope = Rope()
    windows: tuple[int | None, ...] = ()
    attention_scale: float = 256**-0.5

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = "config.json") -> Config:
        """Read a config.json, or a part of one that `where` names.

        Raises:
            ConfigError: a field that is missing, out of range, or asks for something that is not implemented.
        """
        values = DEFAULTS | {name: value for name, value in config.items() if value is not None}
        of_local = _pop_local_rope(values, where)
        fields = Fields(values, where)
        fields.choice("hidden_activation", ("gelu_pytorch_tanh",), default="gelu_pytorch_tanh")
        if fields.flag("use_bidirectional_attention", default=False):
            raise ConfigError(f"{where}: use_bidirectional_attention = true is not implemented; only text that is generated is")
        theta = fields.number("rope_local_base_freq", default=10000.0)
        read = cls(
            **llama.usual(fields),
            local_rope=Rope(theta) if of_local is None else Rope.from_hf(Fields({"rope_parameters": of_local}, where)),
            windows=_windows(fields, fields.integer("num_hidden_layers")),
            attention_scale=fields.number("query_pre_attn_scalar", default=256) ** -0.5,
        )
        fields.finish()
        return read

    @property
    def attention_windows(self) -> tuple[int | None, ...]:
        """How many of the newest keys a token sees in each layer, its own included; None: all."""
        return self.windows


class Block(nnx.Module):
    """One layer: attention and MLP, each normalised before and after and added to the residual stream."""

    def __init__(self, config: Config, window: int | None, dtype: np.dtype) -> None:
        size, epsilon = config.hidden_size, config.rms_norm_epsilon
        rope, form = config.rope if window is None else config.local_rope, _form(config, window)
        self.attention_norm = _norm(config, dtype)
        self.attention = Attention(size, config.heads, rope, dtype, bias=config.attention_bias, form=form)
        self.attended_norm = _norm(config, dtype)
        self.mlp_norm = RMSNorm(size, epsilon, dtype, offset=1.0)
        self.mlp = GatedMLP(size, config.intermediate_size, dtype, activation=gelu_tanh)
        self.fed_norm = RMSNorm(size, epsilon, dtype, offset=1.0)

    def __call__(self, stream: Stream, kv: Pool, context: StepContext) -> LayerResult:
        """The residual stream after this layer. Writes to kv, which the caller donates."""
        placement = context.placement
        before = stream.normed(self.attention_norm, placement)
        attended = self.attention(before.normed, kv, context)
        added = Stream(attended.hidden).normed(self.attended_norm, placement).normed
        between = Stream(before.total, added).normed(self.mlp_norm, placement)
        fed = Stream(self.mlp(between.normed, placement)).normed(self.fed_norm, placement).normed
        return LayerResult(Stream(between.total, fed), attended.kv)


class Model(llama.Model):
    """The whole model: see `llama.Model`."""

    def __init__(self, config: Config, dtype: np.dtype) -> None:
        size = config.hidden_size
        self.embedding = Embedding(config.vocab_size, size, dtype, scale=size**0.5)
        self.layers = nnx.List([Block(config, window, dtype) for window in config.windows])
        self.norm = _norm(config, dtype)
        self.lm_head = None if config.tied_embeddings else Head(config.vocab_size, size, dtype)


def _norm(config: Config, dtype: np.dtype) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.rms_norm_epsilon, dtype, offset=1.0)


def _form(config: Config, window: int | None) -> AttentionForm:
    return AttentionForm(scale=config.attention_scale, window=window, norm=HeadNorm(config.rms_norm_epsilon, 1.0))


def _pop_local_rope(values: dict[str, Any], where: str) -> Mapping[str, Any] | None:
    """Newer files describe both ropes by the kind of layer: leave that of full attention where others have theirs, give the other one."""
    both = values.get("rope_parameters")
    if not isinstance(both, Mapping) or not set(KINDS) & set(both):
        return None
    if set(both) != set(KINDS) or not all(isinstance(each, Mapping) for each in both.values()):
        raise ConfigError(f"{where}: rope_parameters must describe {' and '.join(KINDS)} or one rope, found {', '.join(map(str, both))}")
    values["rope_parameters"] = both["full_attention"]
    return both["sliding_attention"]


def _windows(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """From the kind of each layer, or else from how many there are from one that sees everything to the next."""
    window = fields.integer("sliding_window", default=4096)
    pattern = fields.integer("sliding_window_pattern", default=fields.integer("_sliding_window_pattern", default=6))
    fields.read.add("layer_types")
    kinds = fields.values.get("layer_types") or [KINDS[number % pattern == 0] for number in range(1, layers + 1)]
    if not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - set(KINDS):
        raise ConfigError(f"{fields.where}: layer_types must name {' or '.join(KINDS)} for each of {layers} layers")
    return tuple(window if kind == KINDS[0] else None for kind in kinds)


ignored = llama.ignored

_LAYER = "model.layers.*."
WEIGHTS: dict[str, Transform] = {
    **llama.WEIGHTS,
    "layers.*.attention.q_norm.weight": Part(f"{_LAYER}self_attn.q_norm.weight"),
    "layers.*.attention.k_norm.weight": Part(f"{_LAYER}self_attn.k_norm.weight"),
    "layers.*.attended_norm.weight": Part(f"{_LAYER}post_attention_layernorm.weight"),
    "layers.*.mlp_norm.weight": Part(f"{_LAYER}pre_feedforward_layernorm.weight"),
    "layers.*.fed_norm.weight": Part(f"{_LAYER}post_feedforward_layernorm.weight"),
}

TINY = Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, layers=2, heads=HeadShape(4, 2, 16), max_positions=128, tied_embeddings=True,
    windows=(8, None), attention_scale=0.2,
)  # fmt: skip
