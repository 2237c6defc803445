"""Communication of a step: what the compiled text holds, what the sharding implies, and how long a link needs for it.

With `tensor` shards a layer costs two sums over the shards of [tokens, embed]; the embedding costs one more and the logits one gather
(see models/layers.py). Times follow the usual ring: each byte crosses a link 2 (n - 1) / n times for a sum, (n - 1) / n times for a gather
(Austin et al., "How to Scale Your Model", 2025), and every step of the ring takes a hop.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from jaxinfer.models.graph import Graph, arrays_of
from jaxinfer.models.layers import Placement
from jaxinfer.sharding import partition

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
CALL = re.compile(rf" = (?P<result>\(*[a-z][^=]*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """`count` collectives of one kind, of so many result bytes each."""

    kind: str
    bytes: int
    count: int

    def seconds(self, shards: int, bandwidth: float, hop: float) -> float:
        """Time over a ring of `shards` devices whose links give `bandwidth` bytes/s."""
        passes = 2 if self.kind == "all-reduce" else 1
        steps = passes * (shards - 1)
        return self.count * (steps / shards * self.bytes / bandwidth + steps * hop)


def in_text(text: str) -> tuple[Collective, ...]:
    """The collectives of a compiled program, from its text. What stands in a loop counts once."""
    found: dict[tuple[str, int], int] = {}
    for call in CALL.finditer(text):
        nested = call["start"] and call["result"].startswith("((")  # ((operands), results)
        result = call["result"].partition("),")[2] if nested else call["result"]
        sizes = [_nbytes(dtype, shape) for dtype, shape in ARRAY.findall(result) if dtype in SIZES]
        pair = call["start"] and not nested and call["kind"] != "all-reduce"  # (operand, result)
        key = call["kind"], max(sizes, default=0) if pair else sum(sizes)
        found[key] = found.get(key, 0) + 1
    return tuple(Collective(kind, size, count) for (kind, size), count in sorted(found.items()))


class Sharded(NamedTuple):
    """How often a forward pass sums its activations over shards and gathers its logits."""

    sums: int
    gathers: int


def sharded(graph: Graph, placement: Placement) -> Sharded:
    """What the sharding of the weights implies."""
    summed, gathered = 0, 0
    if placement.mesh.shape["tensor"] == 1:
        return Sharded(0, 0)
    for name, spec, contracting in zip(graph.names, graph.specs, graph.contracting, strict=True):
        array = arrays_of(spec)[0]
        parts = tuple(partition(array.shape, array.axes, placement.mesh, placement.rules))
        table = name == "embedding.weight" and parts[0] == "tensor"
        summed += table or (contracting > 0 and "tensor" in parts[-contracting:])
        gathered |= table or (name == "lm_head.weight" and parts[0] == "tensor")
    return Sharded(summed, int(gathered))


def implied(graph: Graph, made: Sharded, tokens: int, rows: int) -> tuple[Collective, ...]:
    """The collectives of a forward pass of so many tokens and rows (of one data replica)."""
    config = graph.config
    sums = Collective("all-reduce", tokens * config.hidden_size * graph.dtype.itemsize, made.sums)
    gathers = Collective("all-gather", rows * config.vocab_size * 4, made.gathers)
    return tuple(each for each in (sums, gathers) if each.count)


def total_bytes(collectives: Iterable[Collective]) -> int:
    """Bytes of all results."""
    return sum(each.bytes * each.count for each in collectives)


def _nbytes(dtype: str, shape: str) -> int:
    return SIZES[dtype] * prod(int(size) for size in shape.split(",") if size)
