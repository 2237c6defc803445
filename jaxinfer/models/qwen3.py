"""Qwen 3 (arXiv 2505.09388) as Hugging Face configures it: a Llama whose query and key heads are normalised before rope, with heads of a
size of their own. Everything else, the names in a checkpoint included, is `llama.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.config import ConfigError
from jaxinfer.models import llama
from jaxinfer.models.hf import Fields
from jaxinfer.models.layers import AttentionForm, HeadNorm, HeadShape
from jaxinfer.models.weights import Part, Transform


@dataclass(frozen=True)
class Config(llama.Config):
    """The model's shape, as in `llama.Config`."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Read a config.json.

        Raises:
            ConfigError: a field that is missing, out of range, or asks for something that is not implemented.
        """
        fields = Fields({"head_dim": 128} | dict(config))
        fields.choice("hidden_act", ("silu",), default="silu")
        fields.read.update(("layer_types", "max_window_layers"))
        if config.get("use_sliding_window") in (None, False):
            fields.read.add("sliding_window")  # means nothing then
        if set(config.get("layer_types") or ()) - {"full_attention"}:
            raise ConfigError(f"config.json: layer_types {config['layer_types']} are not implemented for 'qwen3'; only full_attention is")
        read = cls(**llama.usual(fields))
        fields.finish()
        return read


class Block(llama.Block):
    """One layer of Llama with norms of heads."""

    def __init__(self, config: Config, dtype: np.dtype) -> None:
        super().__init__(config, dtype, AttentionForm(norm=HeadNorm(config.rms_norm_epsilon)))


class Model(llama.Model):
    """The whole model: see `llama.Model`."""

    BLOCK = Block


ignored = llama.ignored
NORMS = llama.NORMS

WEIGHTS: dict[str, Transform] = {
    **llama.WEIGHTS,
    "layers.*.attention.q_norm.weight": Part("model.layers.*.self_attn.q_norm.weight"),
    "layers.*.attention.k_norm.weight": Part("model.layers.*.self_attn.k_norm.weight"),
}

TINY = Config(vocab_size=64, hidden_size=32, intermediate_size=48, layers=2, heads=HeadShape(4, 2, 16), max_positions=128)
