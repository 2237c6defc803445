"""Mixtral (Jiang et al., arXiv 2401.04088) as Hugging Face configures it: a Llama whose MLPs are mixtures of experts.

Everything but the experts, the names in a checkpoint included, is `llama.py`; what experts do is `experts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.config import ConfigError
from jaxinfer.models import llama
from jaxinfer.models.experts import Experts, ExpertShape
from jaxinfer.models.hf import Fields
from jaxinfer.models.layers import Attention, HeadShape, RMSNorm, StepContext
from jaxinfer.models.residual import Stream
from jaxinfer.models.weights import Joined, Part, Stacked, Transform

# What Hugging Face takes for fields that are not there, where it is not what others take.
DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6}


@dataclass(frozen=True)
class Config(llama.Config):
    """The model's shape, as in `llama.Config`; intermediate_size is that of one expert."""

    experts: ExpertShape = ExpertShape(8, 2)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Read a config.json.

        Raises:
            ConfigError: a field that is missing, out of range, or asks for something that is not implemented.
        """
        fields = Fields(DEFAULTS | dict(config))
        fields.choice("hidden_act", ("silu",), default="silu")
        fields.read.update(("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"))  # of training
        count = fields.integer("num_local_experts", default=cls.experts.total)
        experts = ExpertShape(count, fields.integer("num_experts_per_tok", default=cls.experts.per_token))
        if experts.per_token > count:
            raise ConfigError(f"config.json: num_experts_per_tok {experts.per_token} is above num_local_experts {count}")
        read = cls(**llama.usual(fields), experts=experts)
        fields.finish()
        return read


class Block(llama.Block):
    """One layer of Llama with experts in place of its MLP."""

    def __init__(self, config: Config, dtype: np.dtype) -> None:
        size, epsilon = config.hidden_size, config.rms_norm_epsilon
        self.attention_norm = RMSNorm(size, epsilon, dtype)
        self.attention = Attention(size, config.heads, config.rope, dtype, bias=config.attention_bias)
        self.mlp_norm = RMSNorm(size, epsilon, dtype)
        self.experts = Experts(size, config.intermediate_size, config.experts, dtype)

    def feed(self, stream: Stream, context: StepContext) -> Stream:
        """The residual stream after the experts."""
        before = stream.normed(self.mlp_norm, context.placement)
        return Stream(before.total, self.experts(before.normed, context), counters=stream.counters)


class Model(llama.Model):
    """The whole model: see `llama.Model`."""

    BLOCK = Block


def _expert_rows(config: Config) -> tuple[tuple[int, ...], ...]:
    return ((1, config.intermediate_size),)


ignored = llama.ignored

_MIXTURE = "model.layers.*.block_sparse_moe."
_EXPERT = f"{_MIXTURE}experts.{{}}."
WEIGHTS: dict[str, Transform] = {
    **{name: transform for name, transform in llama.WEIGHTS.items() if ".mlp." not in name},
    "layers.*.experts.router.weight": Part(f"{_MIXTURE}gate.weight"),
    "layers.*.experts.gate_up.weight": Stacked(
        Joined(0, (Part(f"{_EXPERT}w1.weight", _expert_rows), Part(f"{_EXPERT}w3.weight", _expert_rows)))
    ),
    "layers.*.experts.down.weight": Stacked(Part(f"{_EXPERT}w2.weight")),
}

TINY = Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, layers=2, heads=HeadShape(4, 2, 8), max_positions=128, experts=ExpertShape(4, 2)
)
