"""The target while somebody learns from it: its weights on the mesh, and what it makes of packed texts.

The target runs as it is served (dtype, quantised weights), over whole texts (`Sequences`), without a gradient. Its logits are made from its
hidden states a block of places at a time by whoever compares them; distributions over the vocabulary are never kept. This file does not
know what is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.checkpoint import read
from jaxinfer.models.graph import Graph
from jaxinfer.models.layers import Placement, StepContext

Leaves = tuple[Array, ...]


class Seen(NamedTuple):
    """What a model makes of packed texts: hidden states after the final norm, and the residual stream where it was tapped, side by side."""

    hidden: Float[Array, "tokens embed"]
    features: Float[Array, "tokens features"]


@dataclass(frozen=True)
class Teacher:
    """The target's description: its folder, name and graph, and where it runs. Its arrays travel beside it."""

    folder: Path
    name: str
    graph: Graph
    placement: Placement

    def load(self, progress: Callable[[int, int], None] | None = None) -> Leaves:
        """Read its weights onto the mesh.

        Raises:
            CheckpointError: they are damaged.
        """
        weights = read.load(self.folder, self.graph, self.placement.mesh, self.placement.rules, progress=progress)
        return self.graph.leaves(weights)

    def look(self, leaves: Leaves, tokens: Int[Array, " tokens"], context: StepContext, tapped: Sequence[int] = ()) -> Seen:
        """Run over packed texts; inside a trace. No gradient flows through."""
        return jax.lax.stop_gradient(look(self.graph.bind(leaves), self.graph, tokens, context, tapped))

    def head(self, leaves: Leaves, hidden: Float[Array, "places embed"]) -> Float[Array, "places vocab"]:
        """Float32 logits of some of the hidden states; inside a trace."""
        model: Any = self.graph.bind(leaves)
        return model.head(hidden, self.placement)


def look(model: Any, graph: Graph, tokens: Int[Array, " tokens"], context: StepContext, tapped: Sequence[int] = ()) -> Seen:
    """Run a bound model over packed texts, whose context has `Sequences`, and note the residual stream before the layers `tapped` (the
    number of layers: after the last). Differentiable if the model's matmuls are (implementation "xla", weights that are not quantised)."""
    none = tuple(jnp.zeros((), graph.dtype) for _ in graph.config.attention_shapes)
    found = model(tokens, none, replace(context, tapped=tuple(tapped)))
    features = jnp.zeros((len(tokens), 0), found.hidden.dtype) if found.features is None else found.features
    return Seen(found.hidden, features)
