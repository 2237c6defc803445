"""Predicted time of a step: bytes and operations of one device over its peak rates, over the share of them that is reached.

A decode step reads every weight once (of experts those that its tokens choose, evenly by assumption) and each row's keys and values;
a prefill multiplies every weight with every prompt token. Each part has its efficiency (efficiency.py); communication is a part of its own.
What bounds a phase is the largest of its bare memory, compute and communication times. These are predictions: LOG.md says how they
compared with what was measured.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

from jaxinfer.devices import Chip
from jaxinfer.models.experts import share_met, share_used
from jaxinfer.models.graph import Graph, arrays_of
from jaxinfer.models.layers import Placement
from jaxinfer.planner import collectives, efficiency
from jaxinfer.quant.qarray import PACKED
from jaxinfer.sharding import ArraySpec, device_bytes, named

INTEGER_SCHEME = "w8a8"  # weights and activations in int8; other schemes multiply in the activations' dtype


class Phase(NamedTuple):
    """Seconds of one phase and its parts; memory and compute are bare times at the chip's peak, the others with their efficiency."""

    seconds: float
    matmul: float
    attention: float
    small: float
    communication: float
    memory: float
    compute: float

    @property
    def bound(self) -> str:
        """What the phase is bound by."""
        bare = {"memory": self.memory, "compute": self.compute, "communication": self.communication}
        return max(bare, key=lambda name: bare[name])

    @property
    def utilisation(self) -> float:
        """Share of the time that the chip's peak rates would need."""
        return max(self.memory, self.compute) / self.seconds


@dataclass(frozen=True)
class Kernels:
    """Which implementations run, and what the weights are stored in. passed_over: why attention is not the platform's own kernel."""

    attention: str
    matmul: str
    weights: str
    passed_over: str | None = None


@dataclass(frozen=True)
class Predictor:
    """Times of one model on one mesh of one kind of chip. kv_token: bytes of keys and values of a token on one device, all layers; codes:
    they are 8-bit codes, which kernels may read at a rate of their own (`share_codes`)."""

    graph: Graph
    placement: Placement
    chip: Chip
    kernels: Kernels
    kv_token: float
    step_tokens: int
    codes: bool = False
    correction: float = 1.0  # communication in the compiled text over what the sharding implies

    def decode(self, rows: float, context: float) -> Phase:
        """A step of one token for each of `rows` rows (of one data replica) of about so many tokens."""
        weights, kv = self.bytes_met(rows), rows * self._keys(context, 1) * self.kv_token
        operations = 2.0 * (self.layer_weights + self.head_weights) * rows
        attention_operations = sum(
            4.0 * self._heads(it) * it.head_dim * rows * min(context, window or context) for it, window in self._attended
        )
        row = self._row("attention_decode", self.kernels.attention)
        of_rows = self.graph.config.layers * row.number("row_us") * rows * 1e-6
        share = row.number("share_codes" if self.codes and "share_codes" in row.values else "share")
        attention = self._launches() + of_rows + kv / (self.chip.bandwidth * share)
        return self._phase(
            weights + kv, operations + attention_operations, self._matmul(weights, operations, rows), attention,
            self._small(rows), self._communication(rows, rows),
        )  # fmt: skip

    def prefill(self, tokens: int) -> Phase:
        """One prompt of so many tokens, in chunks of what a step holds."""
        parts = [self._chunk(start, min(self.step_tokens, tokens - start)) for start in range(0, tokens, self.step_tokens)]
        return Phase(*(sum(values) for values in zip(*parts, strict=True)))

    @cached_property
    def weight_bytes(self) -> float:
        """Bytes of weights on one device that a step may read: all but an embedding table of its own."""
        return self.bytes_met(float("inf"))

    def bytes_met(self, tokens: float) -> float:
        """Those that so many tokens read: of experts the ones that they choose, where the grouped matmul reads no others."""
        rules, config = self.placement.rules, self.graph.config
        tokens = tokens if self.chip.platform == "tpu" or self.kernels.weights in ("int8", "fp8") else float("inf")
        found = self._read_once.items()
        return sum(device_bytes(array, self.placement.mesh, rules) * count * share_met(array, config, tokens) for array, count in found)

    @cached_property
    def _read_once(self) -> Counter[ArraySpec]:
        arrays = Counter(self.graph.arrays)
        names = dict(zip(self.graph.names, self.graph.specs, strict=True))
        if "lm_head.weight" in names:
            arrays.subtract(arrays_of(names["embedding.weight"]))
        return arrays

    @cached_property
    def layer_weights(self) -> float:
        """Numbers of one device that a token is multiplied with, the head's left out; of experts those that it goes through."""
        found = zip(self.graph.names, self.graph.specs, self.graph.contracting, strict=True)
        arrays = Counter(arrays_of(spec)[0] for name, spec, contracting in found if contracting and name != "lm_head.weight")
        return sum(self._shard(array) * count * share_used(array, self.graph.config) for array, count in arrays.items())

    @cached_property
    def sharded(self) -> collectives.Sharded:
        """How often shards talk in a forward pass."""
        return collectives.sharded(self.graph, self.placement)

    @cached_property
    def head_weights(self) -> int:
        """The head's: multiplied with the rows that sample only."""
        names = dict(zip(self.graph.names, self.graph.specs, strict=True))
        return self._shard(arrays_of(names.get("lm_head.weight", names["embedding.weight"]))[0])

    @property
    def _attended(self) -> zip[tuple[Any, int | None]]:
        """Each layer's heads, and how many of the newest keys they see."""
        return zip(self.graph.config.attention_shapes, self.graph.config.attention_windows, strict=True)

    def _keys(self, context: float, queries: float) -> float:
        """Keys that so many queries at the end of a context see, a mean over the layers."""
        seen = [min(context, context if window is None else window + queries - 1) for _, window in self._attended]
        return sum(seen) / len(seen)

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the efficiencies come from, one line for each."""
        rows = [self._row("matmul", self.kernels.matmul), self._row("small")]
        rows += [self._row(f"attention_{phase}", self.kernels.attention) for phase in ("decode", "prefill")]
        rows += [self._row("link")] if self.placement.mesh.shape["tensor"] > 1 else []
        return tuple(f"{row.values['what']}: {row.source}" for row in rows)

    def _chunk(self, start: int, tokens: int) -> Phase:
        weights, read = self.bytes_met(tokens), self._keys(start + tokens, tokens) * self.kv_token
        operations = 2.0 * (self.layer_weights * tokens + self.head_weights)
        attended = sum(4.0 * self._heads(it) * it.head_dim * pairs(start, tokens, window) for it, window in self._attended)
        share = self._row("attention_prefill", self.kernels.attention).number("share")
        attention = max(attended / (self.chip.bf16_rate * share), read / self.chip.bandwidth) + self._launches()
        matmul, links = self._matmul(weights, operations, tokens), self._communication(tokens, 1)
        return self._phase(weights + read, operations + attended, matmul, attention, self._small(1), links)

    def _phase(self, moved: float, operations: float, matmul: float, attention: float, small: float, communication: float) -> Phase:
        memory, compute = moved / self.chip.bandwidth, operations / self.chip.bf16_rate
        return Phase(matmul + attention + small + communication, matmul, attention, small, communication, memory, compute)

    def _matmul(self, weights: float, operations: float, rows: float) -> float:
        share = self._row("matmul", self.kernels.matmul).at(rows)
        return max(weights / self.chip.bandwidth, operations / self._rate) / share

    @property
    def _rate(self) -> float:
        """Operations per second of the matmuls with weights: those that multiply integers have a rate of their own."""
        return self.chip.int8_rate if self.kernels.weights == INTEGER_SCHEME else self.chip.bf16_rate

    def _small(self, rows: float) -> float:
        row = self._row("small")
        fixed = row.at(1)
        grown = (row.at(rows) - fixed) * self.graph.config.hidden_size / row.number("hidden")
        return self.graph.config.layers * (fixed + grown) * 1e-6

    def _launches(self) -> float:
        """What a step's attention takes however little there is to do."""
        return self.graph.config.layers * self._row("attention_decode", self.kernels.attention).number("base_us") * 1e-6

    def _communication(self, tokens: float, rows: float) -> float:
        shards = self.placement.mesh.shape["tensor"]
        if shards == 1:
            return 0.0
        row = self._row("link")
        made = collectives.implied(self.graph, self.sharded, round(tokens), round(rows))
        bandwidth, hop = self.chip.interconnect * row.number("share"), row.number("hop_us") * 1e-6
        return self.correction * sum(each.seconds(shards, bandwidth, hop) for each in made)

    def _row(self, what: str, implementation: str = "*") -> efficiency.Row:
        return efficiency.find(self.chip, what, implementation=implementation, weights=self.kernels.weights)

    def _heads(self, shape: object) -> int:
        heads, kv_heads = shape.heads, shape.kv_heads  # pyright: ignore[reportAttributeAccessIssue]
        shards = self.placement.mesh.shape["tensor"]
        return heads // shards if kv_heads % shards == 0 else heads

    def _shard(self, spec: ArraySpec) -> int:
        """Numbers of a weight on one device: a byte of packed ones holds two."""
        return (1 + (spec.dtype == PACKED)) * prod(named(spec, self.placement.mesh, self.placement.rules).shard_shape(spec.shape))


def pairs(start: float, tokens: float, window: int | None) -> float:
    """Pairs of a query and a key that it sees, of so many queries from position `start` on."""
    beyond = [0.0 if window is None else max(end - window, 0.0) for end in (start, start + tokens)]
    return tokens * start + tokens * tokens / 2 - (beyond[1] ** 2 - beyond[0] ** 2) / 2
