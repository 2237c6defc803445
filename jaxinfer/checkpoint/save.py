"""Weights that were learned here become a checkpoint in Hugging Face's layout: the inverse of reading one, tensor by tensor.

The model file's transforms are undone, so a saved folder reads back bit for bit, by whatever reads that model. What is not done here:
config.json, tokenizer, manifest (who trains knows them), quantised weights (convert.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Shaped

from jaxinfer.checkpoint.write import Planned, Progress, write_files
from jaxinfer.models.graph import Graph
from jaxinfer.models.weights import Transform, transform_of


def save(
    folder: Path, graph: Graph, weights: Mapping[str, Array], dtype: np.dtype, *, more: Sequence[Planned] = (),
    progress: Progress | None = None,
) -> dict[str, dict[str, str]]:  # fmt: skip
    """Write an unquantised graph's weights, cast to dtype (tables of ids to int64), into a folder, and `more` behind them; the SHA-256 of
    each tensor, by file, for its manifest.

    One of our weights at a time is on the host. progress is called with (bytes written, bytes in all).
    """
    planned: list[Planned] = []
    for name in graph.names:
        transform, layer = transform_of(name, graph.module.WEIGHTS)
        whole = _Whole(graph, weights[name], transform, layer)
        for tensor, shape in transform.needs(graph.config, weights[name].shape, layer).items():
            written = np.dtype(np.int64 if weights[name].dtype == np.int32 else dtype)
            planned.append(Planned(tensor, written, shape, partial(whole.pieces, tensor, written)))
    return write_files(folder, [*planned, *more], progress=progress)


class _Whole:
    """One of our weights, fetched when the first of its tensors is written and let go after the last."""

    def __init__(self, graph: Graph, array: Array, transform: Transform, layer: str) -> None:
        self._graph, self._array, self._transform, self._layer = graph, array, transform, layer
        self._tensors: dict[str, np.ndarray] = {}

    def pieces(self, tensor: str, dtype: np.dtype) -> Iterator[Shaped[np.ndarray, "..."]]:
        """The tensor, in one piece."""
        if not self._tensors:
            held: Any = jax.device_get(self._array)
            self._tensors = self._transform.tensors(self._graph.config, np.asarray(held), self._layer)
        yield np.ascontiguousarray(self._tensors.pop(tensor)).astype(dtype)
