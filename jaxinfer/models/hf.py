"""A Hugging Face config.json read strictly: each field has a type and a range, and what is not understood is refused by name.

A model file takes its fields out of a `Fields` and then calls `finish`, which refuses settings that change the arithmetic in ways the
file does not implement and logs the names of fields that nobody has read. Knows no particular model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from jaxinfer.config import ConfigError

_logger = logging.getLogger("jaxinfer.models")

# Fields that describe training, tokens or the file itself; they do not change what the model computes.
HARMLESS = frozenset(
    "_name_or_path _attn_implementation architectures attention_dropout attn_implementation bos_token_id chunk_size_feed_forward dtype "
    "eos_token_id embd_pdrop hidden_dropout id2label initializer_range is_decoder is_encoder_decoder label2id mlp_dropout model_type name "
    "output_attentions output_hidden_states pad_token_id pretraining_tp problem_type resid_pdrop return_dict tie_encoder_decoder "
    "torch_dtype transformers_version unsloth_fixed unsloth_version use_cache vocab_padding".split()
)

# Fields that do change it, with the values that mean "not used".
UNUSED_VALUES: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_interleaved": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "auto_map": (None,),
    "use_qk_norm": (None, False),
}


class Fields:
    """The fields of one config.json. Every reader raises ConfigError naming the field, what was expected and what was found."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where
        self.read: set[str] = set()

    def integer(self, name: str, *, default: int | None = None, low: int = 1) -> int:
        """A whole number >= low; without a default it must be there."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
            raise self._wrong(name, f"a whole number from {low} up", value)
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        """A finite number above 0; without a default it must be there."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self._wrong(name, "a finite number above 0", value)
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def choice(self, name: str, known: tuple[str, ...], *, default: str) -> str:
        """One of the known words."""
        value = self._value(name, default)
        if value not in known:
            raise self._wrong(name, f"one of {', '.join(known)} (what this model file implements)", value)
        return value

    def table(self, name: str) -> Mapping[str, Any] | None:
        """A JSON object, or None where there is none."""
        self.read.add(name)
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self._wrong(name, "an object", value)
        return value or None

    def finish(self) -> None:
        """Refuse settings that change the arithmetic and are not implemented; log fields that are unknown altogether."""
        for name, unused in UNUSED_VALUES.items():
            value = self.values.get(name)
            if name not in self.read and not any(value is known or (value == known and type(value) is type(known)) for known in unused):
                raise ConfigError(
                    f"{self.where}: {name} = {_short(value)} is not implemented for {self.values.get('model_type')!r}, and ignoring "
                    f"it would change the model's outputs; use a checkpoint without it"
                )
        unknown = sorted(set(self.values) - self.read - HARMLESS - set(UNUSED_VALUES))
        if unknown:
            _logger.warning("%s: fields not known here and not used: %s", self.where, ", ".join(unknown))

    def _value(self, name: str, default: Any) -> Any:
        self.read.add(name)
        value = self.values.get(name)
        if value is None and default is None:
            raise ConfigError(
                f"{self.where} has no {name}: the model's shape is unknown without it; is this the folder of a complete model?"
            )
        return default if value is None else value

    def _wrong(self, name: str, expected: str, found: object) -> ConfigError:
        return ConfigError(f"{self.where}: {name} must be {expected}, found {_short(found)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
