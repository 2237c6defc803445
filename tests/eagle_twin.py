"""What an EAGLE-3 head says next, the slow way: NumPy in float64 over a whole text, no pages, no chunks, nothing kept from before.

`EagleTwin.drafts(text, count)` runs the target over the text, the head over it with what the target made of all but its last token, and
then the head alone on its own hidden states, each time from the beginning.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer.models.graph import Graph


class EagleTwin:
    """A target of the Llama family and its head, by our names of their weights."""

    def __init__(self, target: Graph, head: Graph, leaves: Sequence[jax.Array]) -> None:
        self.target, self.head = target.config, head.config
        count = len(target.arrays)
        self.of_target, self.of_head = (
            {name: np.asarray(value, np.float64) for name, value in graph.weights(part).items()}
            for graph, part in ((target, leaves[:count]), (head, leaves[count:]))
        )

    def drafts(self, text: Sequence[int], count: int) -> list[int]:
        """The likeliest tokens after the text, as the head sees it."""
        return [token for token, _ in self.thoughts(text, count)]

    def thoughts(self, text: Sequence[int], count: int, following: Sequence[int] = ()) -> list[tuple[int, np.ndarray]]:
        """Those tokens with the hidden states that they come from; the text goes on with them, or as it is known to."""
        w, text, found = self.of_head, list(text), []
        features = np.concatenate([np.zeros((1, self.head.hidden_size)), self.features(text)[:-1] @ w["fuse.weight"].T])
        for _ in range(count):
            vectors = (w if "embedding.weight" in w else self.of_target)["embedding.weight"][text]
            both = np.concatenate([self._norm(vectors, w["token_norm.weight"]), self._norm(features, w["feature_norm.weight"])], axis=1)
            hidden = self._block(features, both, w, "", self.head)
            logits = self._norm(hidden[-1:], w["norm.weight"]) @ w["lm_head.weight"].T
            best = int(np.argmax(logits))
            found.append((best + int(w["d2t"][best]) if "d2t" in w else best, hidden[-1]))
            text.append(following[len(found) - 1] if following else found[-1][0])
            features = np.concatenate([features, hidden[-1:]])
        return found

    def features(self, text: Sequence[int]) -> np.ndarray:
        """The target's residual stream at the tapped places, side by side."""
        x, w = self.of_target["embedding.weight"][list(text)], self.of_target
        streams = [x]
        for layer in range(self.target.layers):
            name = f"layers.{layer}."
            x = self._block(x, self._norm(x, w[f"{name}attention_norm.weight"]), w, name, self.target)
            streams.append(x)
        return np.concatenate([streams[layer] for layer in self.head.tapped], axis=1)

    def _block(self, residual: np.ndarray, x: np.ndarray, w: Mapping[str, np.ndarray], name: str, config: Any) -> np.ndarray:
        shape = config.heads
        qkv = np.einsum("td,kghd->tkgh", x, w[f"{name}attention.qkv.weight"].reshape(shape.kv_heads, shape.group + 2, shape.head_dim, -1))
        angles = np.arange(len(x))[:, None] * config.rope.frequencies(shape.head_dim).astype(np.float64)
        cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
        low, high = np.split(qkv[:, :, : shape.group + 1], 2, axis=-1)
        turned = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
        scores = np.einsum("tkgh,skh->kgts", turned[:, :, : shape.group], turned[:, :, -1]) * shape.head_dim**-0.5
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("kgts,skh->tkgh", weights / weights.sum(-1, keepdims=True), qkv[:, :, -1])
        out = residual + np.einsum("tkgh,dkgh->td", mixed, w[f"{name}attention.out.weight"])
        up = np.einsum("td,nmd->ntm", self._norm(out, w[f"{name}mlp_norm.weight"]), w[f"{name}mlp.gate_up.weight"])
        return out + (up[0] / (1 + np.exp(-up[0])) * up[1]) @ w[f"{name}mlp.down.weight"].T

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * weight
