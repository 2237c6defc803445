"""What activations look like on the user's own texts, and the factors that follow: SmoothQuant (arXiv 2211.10438) folded into the norms.

The unquantised model reads every text once; inside its program the largest magnitude of each input of each matrix is kept. Where a few
inputs are much larger than the others, 8 bits for a token serve only them: so a norm's output is divided there and the columns of the
matrices behind it are multiplied. The model file says which matrices read a norm (`NORMS`). Factors are powers of two, which change no
bit of the unquantised model's products, so the checkpoint stays one that any tool reads. Matrices with no norm in front are left alone.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from jaxinfer import devices, prompts
from jaxinfer.checkpoint import read
from jaxinfer.checkpoint.errors import CheckpointError
from jaxinfer.checkpoint.formats.folder import WeightFiles
from jaxinfer.checkpoint.formats.safetensors import LazyTensor
from jaxinfer.config import ConfigError
from jaxinfer.models import find
from jaxinfer.models.graph import Graph, Quantization
from jaxinfer.models.layers import Placement, StepContext
from jaxinfer.models.weights import transform_of
from jaxinfer.quant import w8a8
from jaxinfer.quant.observe import Observed
from jaxinfer.sharding import make_mesh, zeros
from jaxinfer.tokenizer import Tokenizer
from pallas_kernels import PagedMetadata

LONGEST = 2048  # tokens of a text that are read
PAGE = 64
LIMIT = 2.0**10  # of the factors

Progress = Callable[[str, int, int], None]


def factors(source: Path, file: Path, quantization: Quantization, *, progress: Progress | None = None) -> dict[str, np.ndarray]:
    """For the norms and the w8a8 matrices behind them, by the graph's names, what `convert` multiplies and divides by.

    progress is called with (stage, done, total).

    Raises:
        CheckpointError: the model cannot be read. ConfigError: no texts, or not of the form that is asked for; a model file without NORMS.
    """
    config = read.read_config(source)
    module = find.find(config.get("model_type"))
    if not hasattr(module, "NORMS"):
        raise ConfigError(f"--calibrate: the model file of {config.get('model_type')!r} does not say which norms feed which matrices")
    dtype = np.float32 if devices.platform() == "cpu" else jnp.bfloat16
    graph = Graph.of(module, module.Config.from_hf(config), dtype)
    texts = documents(file, Tokenizer.load(source), min(LONGEST, graph.config.max_positions))
    seen = largest_inputs(source, graph, texts, progress=progress)
    with WeightFiles(source) as files:
        return _balance(graph, files.tensors, seen, quantization)


def documents(file: Path, tokenizer: Tokenizer, longest: int) -> list[list[int]]:
    """The token ids of each line of a JSONL file, prompt and completion, cut after `longest`.

    Raises:
        ConfigError: as `prompts.read` and `prompts.encode`.
    """
    found = prompts.encode(prompts.read(file, "--calibrate"), tokenizer, sys.maxsize)
    return [[*document.prompt, *document.completion][:longest] for document in found]


def largest_inputs(
    source: Path, graph: Graph, texts: Sequence[Sequence[int]], *, progress: Progress | None = None
) -> dict[str, Float32[np.ndarray, "..."]]:
    """The largest magnitude of each input of each matrix of the graph, over all texts.

    Raises:
        CheckpointError: the model cannot be read, or computes numbers that are not finite.
    """
    mesh = make_mesh({}, jax.local_devices()[:1])
    weights = read.load(source, graph, mesh, progress=None if progress is None else partial(progress, "read"))
    pages = 1 + -(-max(map(len, texts)) // PAGE)
    pool = tuple(zeros(spec, mesh) for spec in graph.kv_specs(pages, PAGE))
    run = jax.jit(partial(_observe, graph, Placement(mesh)), donate_argnums=1)
    seen: dict[str, np.ndarray] = {}
    for number, text in enumerate(texts, 1):
        size = max(16, 1 << (len(text) - 1).bit_length())
        tokens, positions = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        tokens[: len(text)], positions[: len(text)] = text, range(len(text))
        found, pool = run(graph.leaves(weights), pool, tokens, positions, _metadata(len(text), pages))
        seen = {name: np.maximum(np.asarray(values), seen.get(name, 0)) for name, values in found.items()}
        if progress is not None:
            progress("observe", number, len(texts))
    broken = next((name for name, values in seen.items() if not np.isfinite(values).all()), None)
    if broken is not None:
        raise CheckpointError(f"{source}: the inputs of {broken} are not finite on the texts of --calibrate")
    return seen


def _observe(
    graph: Graph, placement: Placement, leaves: tuple[Array, ...], kv: tuple[Array, ...], tokens: Int32[Array, " tokens"],
    positions: Int32[Array, " tokens"], metadata: PagedMetadata,
) -> tuple[dict[str, Array], tuple[Array, ...]]:  # fmt: skip
    """Maxima of the inputs of every product of one step, and the pools. Donates kv."""
    seen: dict[str, Array] = {}
    contracting = dict(zip(graph.names, graph.contracting, strict=True))

    def wrap(name: str, weight: Any) -> Any:
        def note(x: Array) -> None:
            there = (positions >= 0).reshape(-1, *(1,) * (x.ndim - 1))
            seen[name] = jnp.max(jnp.where(there, jnp.abs(x.astype(jnp.float32)), jnp.float32(0)), axis=0)

        return Observed(weight, note) if contracting[name] else weight

    model: Any = graph.bind(leaves, wrap)
    out = model(tokens, kv, StepContext(positions, metadata, placement))
    model.head(out.hidden, placement)
    return seen, out.kv


def _metadata(length: int, pages: int) -> PagedMetadata:
    """One row that begins with page 1."""
    table = np.arange(1, pages, dtype=np.int32)[None]
    start, count = jnp.zeros(1, jnp.int32), jnp.full(1, length, jnp.int32)
    return PagedMetadata(jnp.asarray(table), start, count, count, decode_rows=0)


def _balance(
    graph: Graph, tensors: Mapping[str, LazyTensor], seen: Mapping[str, np.ndarray], quantization: Quantization
) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name in graph.names:
        readers = _readers(graph, name)
        if not readers or not set(readers) <= set(seen) or any(quantization.scheme_of(reader) != "w8a8" for reader in readers):
            continue
        held = np.max([_largest_in_columns(graph, tensors, reader) for reader in readers], axis=0)
        wanted = w8a8.smoothing(seen[readers[0]], held)
        powers = np.clip(2.0 ** np.rint(np.log2(wanted)), 1 / LIMIT, LIMIT).astype(np.float32)
        norm = _whole(graph, tensors, name)
        kept = norm.astype(np.float32) * powers
        exact = kept.astype(norm.dtype).astype(np.float32) == kept
        found |= dict.fromkeys((name, *readers), np.where(exact, powers, np.float32(1)))
    return found


def _readers(graph: Graph, norm: str) -> list[str]:
    """The matrices that read a norm."""
    layer = next((part for part in norm.split(".") if part.isdigit()), "*")
    patterns = next((names for pattern, names in graph.module.NORMS.items() if fnmatch.fnmatchcase(norm, pattern)), ())
    return [pattern.replace("*", layer) for pattern in patterns]


def _whole(graph: Graph, tensors: Mapping[str, LazyTensor], name: str) -> np.ndarray:
    transform, layer = transform_of(name, graph.module.WEIGHTS)
    shape = graph.specs[graph.names.index(name)].shape
    return transform.read(tensors, graph.config, shape, layer, tuple(slice(0, size) for size in shape))


def _largest_in_columns(graph: Graph, tensors: Mapping[str, LazyTensor], name: str) -> np.ndarray:
    weight, contracting = _whole(graph, tensors, name), graph.contracting[graph.names.index(name)]
    return np.max(np.abs(weight.astype(np.float32)), axis=tuple(range(weight.ndim - contracting)))
