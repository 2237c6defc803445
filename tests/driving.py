"""Drives a model through the paged path as the engine does, for tests of everything below the engine.

Prompts are rows; with a data axis, row i belongs to replica i % replicas, and every replica has pages and packed tokens of its own.
`Driver.logits` prefills ragged prompts in packed steps and then feeds one token per row and step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxinfer.checkpoint import read
from jaxinfer.models.find import find
from jaxinfer.models.graph import Graph, Quantization
from jaxinfer.models.layers import Placement, StepContext
from jaxinfer.models.residual import Stream
from jaxinfer.sharding import make_mesh, zeros
from pallas_kernels import PagedMetadata

GOLDEN = Path(__file__).parent / "golden"
PAGE_SIZE, PAGES_PER_ROW = 4, 12
PREFILL = ([3, 1, 10, 4], [2, 0, 3, 1])  # of golden prompts: two packed steps; the rest is decoded token by token
PREFILL_TOKENS = 20  # packed prefill steps are padded to it, so that they share one program


@dataclass(frozen=True)
class Chunk:
    """Some tokens of one row, beginning at a position; no tokens: the row sits this step out."""

    start: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One packed step: host arrays in the layout of PagedMetadata, and where each row's tokens are."""

    tokens: np.ndarray
    positions: np.ndarray
    metadata: PagedMetadata
    places: list[slice]


def golden_graph(name: str, dtype: str = "float32", quantization: Quantization | None = None) -> Graph:
    """The graph of a golden model."""
    config = read.of_model(read.read_config(GOLDEN / name))
    module = find(config["model_type"])
    return Graph.of(module, module.Config.from_hf(config), dtype, quantization)


def golden_expected(name: str) -> tuple[list[list[int]], list[np.ndarray], np.ndarray]:
    """Prompts, Hugging Face's logits of each prompt, its residual streams [layers + 1, tokens, embed]."""
    with np.load(GOLDEN / name / "expected.npz") as file:
        ends = np.cumsum(file["lengths"])[:-1]
        return [list(map(int, part)) for part in np.split(file["tokens"], ends)], np.split(file["logits"], ends), file["streams"]


def assert_parity(name: str, mesh: dict[str, int]) -> None:
    """Ragged prompts in packed steps, then token by token: our logits on a mesh are Hugging Face's."""
    prompts, logits, _ = golden_expected(name)
    ours = Driver.golden(name, make_mesh(mesh)).logits(prompts, PREFILL)
    for mine, theirs in zip(ours, logits, strict=True):
        assert mine.dtype == np.float32
        assert np.abs(mine - theirs).max() <= 1e-4
        assert (mine.argmax(-1) == theirs.argmax(-1)).all()


def assert_climbs(name: str) -> None:
    """The residual stream after each layer is Hugging Face's."""
    prompts, _, streams = golden_expected(name)
    driver = Driver.golden(name)
    step = pack([Chunk(0, tuple(prompt)) for prompt in prompts], 1, decode=False)
    ours = np.asarray(jax.jit(driver.climb)(driver.leaves, driver.pool(4), step.tokens, step.positions, step.metadata))
    for layer, (mine, theirs) in enumerate(zip(ours, streams, strict=True)):
        picked = np.concatenate([mine[place] for place in step.places])
        assert np.abs(picked - theirs).max() <= 2e-5 * np.abs(theirs).max(), f"layer {layer}"


def pack(chunks: Sequence[Chunk], replicas: int, *, decode: bool) -> Step:
    """Lay the rows' chunks out, replica after replica, padded to equal sizes."""
    rows = -(-len(chunks) // replicas)
    shares = [[chunks[i] for i in range(len(chunks)) if i % replicas == r] for r in range(replicas)]
    size = rows if decode else max(PREFILL_TOKENS, *(sum(len(chunk.tokens) for chunk in share) for share in shares))
    tokens, positions = np.zeros((replicas, size), np.int32), np.full((replicas, size), -1, np.int32)
    fields = {name: np.zeros((replicas, rows), np.int32) for name in ("query_starts", "query_lengths", "kv_lengths")}
    tables = np.zeros((replicas, rows, PAGES_PER_ROW), np.int32)
    places: dict[int, slice] = {}
    for r, share in enumerate(shares):
        at = 0
        for row, chunk in enumerate(share):
            at, count = (row if decode else at), len(chunk.tokens)
            tokens[r, at : at + count] = chunk.tokens
            positions[r, at : at + count] = range(chunk.start, chunk.start + count)
            tables[r, row] = 1 + row + rows * np.arange(PAGES_PER_ROW)  # interleaved, so that pages of a row are never adjacent
            kv_length = chunk.start + count if count else 0
            for name, value in zip(fields, (at, count, kv_length), strict=True):
                fields[name][r, row] = value
            places[row * replicas + r] = slice(r * size + at, r * size + at + count)
            at += count
    flat = {name: jnp.asarray(value.reshape(-1)) for name, value in fields.items()}
    metadata = PagedMetadata(jnp.asarray(tables.reshape(-1, PAGES_PER_ROW)), **flat, decode_rows=rows if decode else 0)
    return Step(tokens.reshape(-1), positions.reshape(-1), metadata, [places[i] for i in range(len(chunks))])


class Driver:
    """A graph with weights on a mesh, and the pool of a few rows."""

    def __init__(
        self, graph: Graph, leaves: Sequence[jax.Array], mesh: Mesh | None = None, *, implementation: str = "auto", codes: str | None = None
    ) -> None:
        self.graph, self.leaves, self.mesh = graph, tuple(leaves), make_mesh({}) if mesh is None else mesh
        self.placement, self.codes = Placement(self.mesh, implementation=implementation), codes
        self.replicas = self.mesh.shape["data"]
        self.run = jax.jit(self.forward, donate_argnums=1)

    @classmethod
    def golden(
        cls,
        name: str,
        mesh: Mesh | None = None,
        *,
        dtype: str = "float32",
        quantization: Quantization | None = None,
        codes: str | None = None,
    ) -> "Driver":
        """A golden model, read by the loader."""
        graph, mesh = golden_graph(name, dtype, quantization), make_mesh({}) if mesh is None else mesh
        return cls(graph, graph.leaves(read.load(GOLDEN / name, graph, mesh)), mesh, codes=codes)

    def pool(self, rows: int) -> tuple[Any, ...]:
        """Empty pools, each replica with a guard page and PAGES_PER_ROW pages for each of its rows."""
        pages = self.replicas * (1 + -(-rows // self.replicas) * PAGES_PER_ROW)
        specs = self.graph.kv_specs(pages, PAGE_SIZE, implementation=self.placement.implementation, codes=self.codes)
        return jax.tree.map(lambda spec: zeros(spec, self.mesh), specs)

    def forward(self, leaves, kv, tokens, positions, metadata):
        """One step: logits of every packed token, and the pools."""
        model = self.graph.bind(leaves)
        out = model(tokens, kv, StepContext(positions, metadata, self.placement))
        return model.head(out.hidden, self.placement), out.kv

    def climb(self, leaves, kv, tokens, positions, metadata):
        """The residual stream after the embedding and after each layer."""
        model, context = self.graph.bind(leaves), StepContext(positions, metadata, self.placement)
        streams = [Stream(model.embedding(tokens, self.placement))]
        for block, pool in zip(model.layers, kv, strict=True):
            streams.append(block(streams[-1], pool, context).stream)
        return jnp.stack([stream.total(self.placement) for stream in streams])

    def logits(self, prompts: Sequence[Sequence[int]], prefill: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Logits of every position. prefill[step][row]: tokens of the row in that packed step; what is left goes one by one."""
        kv, done = self.pool(len(prompts)), [0] * len(prompts)
        found: list[list[np.ndarray]] = [[] for _ in prompts]
        steps = [(list(counts), False) for counts in prefill]
        left = max(len(prompt) - sum(counts) for prompt, counts in zip(prompts, zip(*prefill, strict=True), strict=True))
        for counts, decode in steps + [([1] * len(prompts), True)] * left:
            chunks = [Chunk(at, tuple(prompt[at : at + n])) for prompt, at, n in zip(prompts, done, counts, strict=True)]
            step = pack(chunks, self.replicas, decode=decode)
            logits, kv = self.run(self.leaves, kv, step.tokens, step.positions, step.metadata)
            for row, (place, chunk) in enumerate(zip(step.places, chunks, strict=True)):
                found[row].append(np.asarray(logits)[place])
                done[row] += len(chunk.tokens)
        return [np.concatenate(pieces) for pieces in found]
