"""An EAGLE-3 head (Li et al. 2025, arXiv 2503.01840): one decoder layer that guesses on from what a target model has computed.

Features of a token are the target's residual stream before a low, a middle and a high layer, projected to the head's size. The layer reads,
at each position, the vector of the token there beside the features of the token before it, each normalised; its residual stream begins with
those features, and what comes out of it stands in for the features where the target has not been yet. Logits are over a draft vocabulary,
whose token i is the target's token i + d2t[i]. The first token of a text has no token before it: its features are zeros.

Weights are named as in the public checkpoints (`LlamaForCausalLMEagle3`: fc, midlayer, norm, lm_head, d2t, t2d). This file does not know
where features are kept (`step/head.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from jaxinfer.config import ConfigError
from jaxinfer.models import llama
from jaxinfer.models.hf import Fields
from jaxinfer.models.layers import (
    Attention,
    Dim,
    Embedding,
    GatedMLP,
    Head,
    HeadShape,
    Placement,
    Projection,
    RMSNorm,
    StepContext,
    describe,
)
from jaxinfer.models.residual import Link, Stream
from jaxinfer.models.rope import Rope
from jaxinfer.models.weights import Part, Transform
from pallas_kernels import Pool

TAPS = 3
DRAFT_VOCAB = 32_000  # of heads that are made up


@dataclass(frozen=True)
class Config:
    """The head's shape. vocab_size: the target's; target_size: features of its residual stream; tapped: see `residual.through`.

    own_embedding: the head has token vectors of its own instead of the target's.
    """

    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    target_size: int
    intermediate_size: int
    heads: HeadShape
    tapped: tuple[int, ...]
    rms_norm_epsilon: float = 1e-6
    rope: Rope = Rope()
    own_embedding: bool = False

    def __post_init__(self) -> None:
        if not self.own_embedding and self.hidden_size != self.target_size:
            raise ConfigError(
                f"the head has {self.hidden_size} features, its target {self.target_size}: it needs an embed_tokens.weight of its own"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], target: Any, *, own_embedding: bool = False) -> Config:
        """Read a head's config.json; target: the config of the model that it belongs to.

        Raises:
            ConfigError: a field that is missing, out of range or not implemented, or that does not fit the target.
        """
        fields = Fields(config, "config.json of the head")
        hidden = fields.integer("hidden_size")
        if fields.integer("num_hidden_layers", default=1) != 1:
            raise ConfigError("config.json of the head: num_hidden_layers must be 1: EAGLE-3 heads of several layers are not implemented")
        for name in ("norm_before_residual", "attention_bias", "mlp_bias", "bias", "tie_word_embeddings"):
            if fields.flag(name, default=False):
                raise ConfigError(f"config.json of the head: {name} = true is not implemented for EAGLE-3 heads")
        fields.choice("hidden_act", ("silu",), default="silu")
        fields.integer("max_position_embeddings", default=1)  # what the target takes counts
        size, vocab = fields.integer("target_hidden_size", default=target.hidden_size), fields.integer("vocab_size")
        if (size, vocab) != (target.hidden_size, target.vocab_size):
            raise ConfigError(
                f"the head is made for a model of {size} features and {vocab} tokens, the target has {target.hidden_size} and"
                f" {target.vocab_size}; name the head of this very model"
            )
        read = cls(
            vocab_size=vocab, draft_vocab_size=fields.integer("draft_vocab_size", default=vocab), hidden_size=hidden, target_size=size,
            intermediate_size=fields.integer("intermediate_size"),
            heads=llama.head_shape(fields, hidden),
            tapped=_tapped(fields, len(target.attention_shapes)),
            rms_norm_epsilon=fields.number("rms_norm_eps", default=cls.rms_norm_epsilon), rope=Rope.from_hf(fields),
            own_embedding=own_embedding,
        )  # fmt: skip
        fields.finish()
        if read.draft_vocab_size > vocab:
            raise ConfigError(f"config.json of the head: draft_vocab_size {read.draft_vocab_size} is above vocab_size {vocab}")
        return read

    @classmethod
    def beside(cls, target: Any, draft_vocab: int = DRAFT_VOCAB) -> Config:
        """The head that one would train for a target: a layer like its own, in the way of the Llama family.

        Raises:
            ConfigError: a target that is not like that.
        """
        if not all(hasattr(target, name) for name in ("intermediate_size", "rms_norm_epsilon", "rope")):
            raise ConfigError("an EAGLE-3 head cannot be made up for this architecture; name one with --draft-model")
        return cls(
            vocab_size=target.vocab_size, draft_vocab_size=min(draft_vocab, target.vocab_size), hidden_size=target.hidden_size,
            target_size=target.hidden_size, intermediate_size=target.intermediate_size, heads=target.attention_shapes[0],
            tapped=usual(len(target.attention_shapes)), rms_norm_epsilon=target.rms_norm_epsilon, rope=target.rope,
        )  # fmt: skip

    def to_hf(self, max_positions: int, dtype: str) -> dict[str, Any]:
        """The config.json of such a head, as public ones have it.

        Raises:
            ValueError: taps that begin at 1 and are not the usual ones for their target, which the layout cannot say.
        """
        if self.tapped[0] == 1 and self.tapped != usual(2):
            raise ValueError(f"taps {self.tapped} cannot be written: readers take a first id of 1 for what comes out of a layer")
        listed = {} if self.tapped[0] == 1 else {"eagle_config": {"eagle_aux_hidden_state_layer_ids": list(self.tapped)}}
        return {
            "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size, "hidden_size": self.hidden_size, "target_hidden_size": self.target_size,
            "intermediate_size": self.intermediate_size, "num_hidden_layers": 1, "num_attention_heads": self.heads.heads,
            "num_key_value_heads": self.heads.kv_heads, "head_dim": self.heads.head_dim, "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_epsilon, "max_position_embeddings": max_positions, "tie_word_embeddings": False,
            "torch_dtype": dtype, **self.rope.to_hf(), **listed,
        }  # fmt: skip

    @property
    def attention_shapes(self) -> tuple[HeadShape, ...]:
        """The heads of its one layer."""
        return (self.heads,)


class HeadOutput(NamedTuple):
    """What the layer makes of each position (no norm yet: it stands in for features), and its pool with this step's keys and values."""

    hidden: Float[Array, "tokens embed"]
    kv: Pool


class Model(nnx.Module):
    """The head, its weights described or bound, like a model's."""

    def __init__(self, config: Config, dtype: np.dtype) -> None:
        size, epsilon = config.hidden_size, config.rms_norm_epsilon
        self.embedding = Embedding(config.vocab_size, size, dtype) if config.own_embedding else None
        self.fuse = Projection([Dim(size, "embed")], [Dim(TAPS * config.target_size)], dtype)
        self.token_norm = RMSNorm(size, epsilon, dtype)
        self.feature_norm = RMSNorm(size, epsilon, dtype)
        self.attention = Attention(size, config.heads, config.rope, dtype)
        kv_heads, lines = Dim(config.heads.kv_heads, "kv_heads"), Dim(config.heads.group + 2)
        self.attention.qkv = Projection([kv_heads, lines, Dim(config.heads.head_dim)], [Dim(2 * size, "embed")], dtype)
        self.mlp_norm = RMSNorm(size, epsilon, dtype)
        self.mlp = GatedMLP(size, config.intermediate_size, dtype)
        self.norm = RMSNorm(size, epsilon, dtype)
        self.lm_head = Head(config.draft_vocab_size, size, dtype)
        reduced = config.draft_vocab_size < config.vocab_size
        self.d2t = describe([Dim(config.draft_vocab_size)], np.dtype(np.int32)) if reduced else None

    def __call__(
        self, vectors: Float[Array, "tokens embed"], before: Float[Array, "tokens embed"], kv: Pool, context: StepContext
    ) -> HeadOutput:
        """Run packed positions; vectors: of their tokens; before: (fused) features of the tokens before them. Writes to kv, which the
        caller donates."""
        placement = context.placement
        both = jnp.concatenate([self.token_norm(vectors), self.feature_norm(before)], axis=-1)
        mixed = self.attention.mix(self.attention.qkv(both, placement), kv, context)
        attended = Stream(before, counters=context.counters).then(Link(self.attention.out), of=mixed.hidden)
        after = attended.then(Link(self.mlp.gate_up, self.mlp_norm, self.mlp.activation), Link(self.mlp.down))
        return HeadOutput(after.total(placement), mixed.kv)

    def head(self, hidden: Float[Array, "rows embed"], placement: Placement) -> Float[Array, "rows drafts"]:
        """Float32 logits over the draft vocabulary of what `__call__` returned."""
        return self.lm_head(self.norm(hidden), placement)

    def targets(self) -> Int32[Array, "drafts"] | None:
        """The target's id of each token of the draft vocabulary; None where it is the target's own."""
        return None if self.d2t is None else self.d2t.get_value() + jnp.arange(self.d2t.get_value().shape[0], dtype=jnp.int32)


def is_head(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an EAGLE-3 head."""
    named = config.get("architectures")
    return "draft_vocab_size" in config or (isinstance(named, list) and any("eagle3" in str(name).lower() for name in named))


def usual(layers: int) -> tuple[int, ...]:
    """Where a target of so many layers is tapped unless the head says otherwise: before layer 2, the middle one and the third last."""
    return (min(2, layers - 1), layers // 2, max(layers - 3, layers // 2))


def ignored(config: Config) -> tuple[str, ...]:
    """Tensors that a checkpoint may hold and that are not needed: t2d is d2t the other way round."""
    return ("t2d",) if config.draft_vocab_size < config.vocab_size else ("t2d", "d2t")


def _tapped(fields: Fields, layers: int) -> tuple[int, ...]:
    """Public heads number the tapped layers in two ways: where the first id is 1, ids mean what comes out of a layer, else what goes in."""
    table = fields.table("eagle_config") or {}
    listed = table.get("eagle_aux_hidden_state_layer_ids", fields.values.get("eagle_aux_hidden_state_layer_ids"))
    fields.read.update(("eagle_config", "eagle_aux_hidden_state_layer_ids"))
    if listed is None:
        return usual(layers)
    whole = isinstance(listed, list) and len(listed) == TAPS and all(isinstance(layer, int) for layer in listed)
    found = tuple(layer + (listed[0] == 1) for layer in listed) if whole else ()
    if not found or min(found) < 0 or max(found) > layers:
        raise ConfigError(
            f"config.json of the head: eagle_aux_hidden_state_layer_ids must be {TAPS} layers of the target's {layers}, found {listed!r}"
        )
    return found


WEIGHTS: dict[str, Transform] = {
    "embedding.weight": Part("embed_tokens.weight"),
    "fuse.weight": Part("fc.weight"),
    "token_norm.weight": Part("midlayer.input_layernorm.weight"),
    "feature_norm.weight": Part("midlayer.hidden_norm.weight"),
    "mlp_norm.weight": Part("midlayer.post_attention_layernorm.weight"),
    "norm.weight": Part("norm.weight"),
    "lm_head.weight": Part("lm_head.weight"),
    "d2t": Part("d2t"),
    **llama.projections("", "midlayer."),
}
