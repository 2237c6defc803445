"""What compiled programs take on each device beside weights, pool and slots: the one arithmetic of engine and planner.

Temporaries of two programs never live at once, but a step's outputs may wait while the next step computes; a program's own code stays
on the device where the compiler says so (TPUs). Programs that were not compiled yet are taken to have the code of the largest compiled
one of their kind. This file does not know how programs are compiled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxinfer.step.buckets import Bucket
from jaxinfer.step.keys import AloneKey

UNSEEN_CODE = 4 << 20  # of a kind that was not compiled: small samplers, scorers and edits of an 8B model have 0.6 to 2 MiB on a TPU
FORWARDS = (Bucket, AloneKey)


@dataclass(frozen=True)
class ProgramSize:
    """Bytes on each device: temporaries, outputs that are not donated inputs, and code."""

    temporary: int
    output: int
    code: int

    @classmethod
    def of(cls, compiled: Any) -> ProgramSize:
        """What the compiler says of a compiled program."""
        sizes = compiled.memory_analysis()
        outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        return cls(sizes.temp_size_in_bytes, max(0, outputs), sizes.generated_code_size_in_bytes)


@dataclass(frozen=True)
class Beside:
    """The largest forward's temporaries, two steps' outputs, what steps without prompts compute (each bucket keeps its own), the largest
    other program's temporaries, and all code; bytes per device."""

    forward: int
    outputs: int
    held: int
    others: int
    code: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.forward + self.outputs + self.held + self.others + self.code


def beside(sizes: Mapping[Any, ProgramSize], keys: Iterable[Any], held: int = 0) -> Beside:
    """What the programs `keys` need, of which those in `sizes` were compiled, with what steps leave in place."""
    forwards = [size for key, size in sizes.items() if isinstance(key, FORWARDS)]
    others = [size.temporary for key, size in sizes.items() if not isinstance(key, FORWARDS)]
    largest: dict[Any, int] = {}
    for key, size in sizes.items():
        largest[kind(key)] = max(size.code, largest.get(kind(key), 0))
    unseen = UNSEEN_CODE if any(largest.values()) else 0
    code = sum(sizes[key].code if key in sizes else largest.get(kind(key), unseen) for key in keys)
    return Beside(
        forward=max((size.temporary for size in forwards), default=0), outputs=2 * max((size.output for size in forwards), default=0),
        held=held, others=max(others, default=0), code=code,
    )  # fmt: skip


def kind(key: Any) -> Any:
    """Programs of one kind differ in their widths only."""
    if isinstance(key, FORWARDS):
        bucket = key.bucket if isinstance(key, AloneKey) else key
        return "mixed" if bucket.prefill_tokens else "decode"
    return (type(key).__name__, getattr(key, "demand", key if isinstance(key, str) else None))
