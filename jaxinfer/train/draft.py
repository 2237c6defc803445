"""The student that is a model of its own: any model file, of any size, with the target's vocabulary.

It starts from a checkpoint (`--draft MODEL`) or from drawn weights (`--draft config.json`). What is learned is float32; each step computes
in the target's dtype, through the model file as it is served. What comes of it is an ordinary model folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinfer.checkpoint import convert, hub, read, save
from jaxinfer.checkpoint.formats.find import FIELD
from jaxinfer.checkpoint.json_files import read_json
from jaxinfer.config import ConfigError
from jaxinfer.models import find
from jaxinfer.models.graph import Graph, random_weights
from jaxinfer.models.layers import Placement
from jaxinfer.sharding import ArraySpec
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.train.student import Leaves, Lesson, Weights
from jaxinfer.train.teacher import Teacher, look

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16), "float16": np.dtype(np.float16)}


@dataclass(frozen=True)
class DraftModel:
    """A model that learns. graph: in the dtype that it computes in. folder: where its weights come from, None if they are drawn."""

    graph: Graph
    placement: Placement
    config: Mapping[str, Any]
    folder: Path | None
    tokenizer: Path
    seed: int

    @property
    def whole(self) -> Graph:
        """The graph in the dtype of what is learned."""
        return Graph.of(self.graph.module, self.graph.config, np.float32)

    @property
    def specs(self) -> Mapping[str, ArraySpec]:
        """Every weight of the model."""
        whole = self.whole
        return {name: spec for name, spec in zip(whole.names, whole.specs, strict=True) if isinstance(spec, ArraySpec)}

    @property
    def tapped(self) -> tuple[int, ...]:
        """It reads nothing of the target."""
        return ()

    @property
    def depth(self) -> int:
        """Each place is as any other."""
        return 1

    @property
    def vocabulary(self) -> None:
        """The target's."""
        return None

    def begin(self) -> Weights:
        """The checkpoint's weights, or drawn ones."""
        mesh, rules = self.placement.mesh, self.placement.rules
        if self.folder is None:
            drawn: Any = random_weights(self.whole, self.seed, mesh, rules)
            return drawn
        found: Any = read.load(self.folder, self.whole, mesh, rules)
        return found

    def hidden(self, weights: Weights, lesson: Lesson) -> tuple[Float[Array, "tokens embed"], ...]:
        """Hidden states after the final norm."""
        return (look(self._bound(weights), self.graph, lesson.tokens, lesson.context).hidden,)

    def head(self, weights: Weights, hidden: Float[Array, "places embed"], leaves: Leaves) -> Float[Array, "places vocab"]:
        """The model's own head."""
        return self._bound(weights).head(hidden, self.placement)

    def save(self, folder: Path, weights: Weights) -> dict[str, dict[str, str]]:
        """A model folder in Hugging Face's layout, in the dtype that its config names."""
        convert.carry(self.tokenizer, folder, self.config)
        named = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        return save.save(folder, self.graph, weights, DTYPES.get(str(named), DTYPES["float32"]))

    def _bound(self, weights: Weights) -> Any:
        cast = [weights[name].astype(self.graph.dtype) for name in self.graph.names]
        return self.graph.bind(cast)


def student(name: str, teacher: Teacher, seed: int) -> DraftModel:
    """The student for a folder, an embedded model, a repository, or the config.json of a model that does not exist yet.

    Raises:
        ConfigError: its vocabulary is not the target's, or its weights are quantised. CheckpointError: it cannot be read.
    """
    path = Path(name).expanduser()
    folder = None if path.is_file() and path.suffix == ".json" else hub.resolve(name)
    values = read_json(path) if folder is None else read.read_config(folder)
    if values.get(FIELD):
        raise ConfigError(f"--draft {name}: its weights are quantised and cannot learn; name the model that it was made from")
    module = find.find(values.get("model_type"))
    config = module.Config.from_hf(values)
    ours, theirs = teacher.graph.config.vocab_size, config.vocab_size
    if ours != theirs:
        raise ConfigError(f"--draft {name}: its vocabulary has {theirs} tokens, the target's {ours}; it must be of the same family")
    if folder is not None and _tokens(folder) != _tokens(teacher.folder):
        raise ConfigError(f"--draft {name} has another tokenizer than {teacher.name}; name one of the same family, or a config.json")
    placement = Placement(teacher.placement.mesh, teacher.placement.rules, "xla")  # other kernels have no gradient
    graph = Graph.of(module, config, teacher.graph.dtype)
    return DraftModel(graph, placement, values, folder, teacher.folder if folder is None else folder, seed)


def _tokens(folder: Path) -> Any:
    return json.loads(Tokenizer.load(folder).to_json())["model"].get("vocab")
