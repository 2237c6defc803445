"""Gemma 3 as Hugging Face configures the model that reads images too (`gemma3`): its text model alone, `gemma3_text.py`.

What belongs to images is left unread, and a line of the log says so; text in, text out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxinfer.config import ConfigError
from jaxinfer.models import gemma3_text
from jaxinfer.models.weights import Joined, Part, Transform

_logger = logging.getLogger("jaxinfer.models")

PREFIX = "language_model."


@dataclass(frozen=True)
class Config(gemma3_text.Config):
    """The text model's shape."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], where: str = "config.json") -> Config:
        """Read the `text_config` of a config.json.

        Raises:
            ConfigError: there is none, or see `gemma3_text.Config.from_hf`.
        """
        inner = config.get("text_config")
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{where} has no text_config, so the model's shape is unknown; is this the folder of a complete model?")
        if config.get("vision_config"):
            _logger.info("the text model of a Gemma 3 that reads images: the part for images is not loaded, and requests are text")
        outer = {name: config[name] for name in ("quantization_config", "tie_word_embeddings") if config.get(name) is not None}
        text = gemma3_text.Config.from_hf({"model_type": "gemma3"} | outer | dict(inner), f"{where}: text_config")
        return cls(**vars(text))


Model = gemma3_text.Model
TINY = Config(**vars(gemma3_text.TINY))


def ignored(config: Config) -> tuple[str, ...]:
    """Patterns of tensors that a checkpoint may hold and that are not needed: those for images, and what the text model does not need."""
    of_text = gemma3_text.ignored(config)
    return ("vision_tower.*", "multi_modal_projector.*", *(f"{PREFIX}{name}" for name in of_text if not name.startswith("*")), *of_text)


def _inside(transform: Transform) -> Transform:
    if isinstance(transform, Joined):
        return replace(transform, parts=tuple(replace(part, name=PREFIX + part.name) for part in transform.parts))
    if isinstance(transform, Part):
        return replace(transform, name=PREFIX + transform.name)
    raise TypeError(f"{transform} is neither a tensor nor several side by side: say here how it is renamed")


WEIGHTS: dict[str, Transform] = {name: _inside(transform) for name, transform in gemma3_text.WEIGHTS.items()}
