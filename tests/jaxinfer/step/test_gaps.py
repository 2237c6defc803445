"""Gaps: an allocator of the best fit, as XLA's is, finds room for what steps bring and make, and temporaries lie still."""

import random
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
import pytest

from jaxinfer.batch import Batch
from jaxinfer.step import gaps
from jaxinfer.step import program as program_module
from jaxinfer.step.inputs import pack

TEMPORARIES = {"forward": 308_736, "draws": 33_536, "wide": 349_696, "verifies": 2_304, "proposes": 331_264}


@dataclass
class BestFit:
    """Memory by address; what is taken lies at the beginning of the smallest piece that is free and large enough."""

    free: dict[int, int] = field(default_factory=lambda: {0: 1 << 30})

    def take(self, size: int) -> "Piece":
        size = -(-size // gaps.UNIT) * gaps.UNIT
        room, at = min((room, at) for at, room in self.free.items() if room >= size)
        del self.free[at]
        if room > size:
            self.free[at + size] = room - size
        return Piece(self, at, size)

    def give(self, at: int, size: int) -> None:
        behind = self.free.pop(at + size, 0)
        before = next((start for start, room in self.free.items() if start + room == at), None)
        self.free[at if before is None else before] = size + behind + (0 if before is None else self.free[before])


@dataclass
class Piece:
    memory: BestFit
    at: int
    size: int

    def __del__(self) -> None:
        self.memory.give(self.at, self.size)


def places(memory: BestFit, steps: list[str], brings: dict[str, list[int]]) -> dict[str, set[int]]:
    """Where each program's temporaries lie over the steps, of which two are in the air."""
    found, flights = {name: set[int]() for name in TEMPORARIES}, deque[list[Piece]]()
    for step in steps:
        programs = {"plain": ["forward", "draws"], "text": ["wide", "verifies"], "model": ["proposes", "wide", "verifies"]}[step]
        if step == "text":  # what it begins with has to be known
            flights.clear()
        made = [memory.take(brings[step][0])]
        for program in programs:
            temporary = memory.take(TEMPORARIES[program])
            found[program].add(temporary.at)
            if program == "proposes":
                made.append(memory.take(16))
            if program in ("draws", "verifies"):
                made += [memory.take(size) for size in brings[step][1:]]
            del temporary
        flights.append(made[1:])
        made.clear()
        if len(flights) > 1:
            flights.popleft()
    return found


def test_temporaries_lie_still_whatever_order_steps_come_in():
    draws = random.Random(1)
    brings = {"plain": [240, 4, 4, 4, 80, 80], "text": [272, 20, 20, 20, 400, 400, 4], "model": [272, 20, 20, 20, 400, 400, 4]}
    steps = draws.choices(["plain", "text", "model"], [8, 1, 2], k=400)
    assert sum(map(len, places(BestFit(), steps, brings).values())) > 2 * len(TEMPORARIES)
    memory, most = BestFit(), Counter[int]()
    for sizes in brings.values():
        most |= Counter(-(-size // gaps.UNIT) * gaps.UNIT for size in (*sizes, 16))
    held = gaps.make(Counter({size: count * gaps.ALIVE for size, count in most.items()}), memory.take)
    assert [len(at) for at in places(memory, steps, brings).values()] == [1] * len(TEMPORARIES)
    del held
    assert memory.free == {0: 1 << 30}


def test_gaps_are_as_many_as_asked_and_last_as_long_as_what_lies_between():
    memory, wanted = BestFit(), Counter({256: 3, 1024: 2})
    held = gaps.make(wanted, memory.take)
    assert Counter(room for room in memory.free.values() if room < 1 << 20) == wanted
    assert sum(piece.size for piece in held) + sum(size * count for size, count in wanted.items()) == gaps.taken(wanted)


@pytest.mark.parametrize("kind", ["plain", "speculating"])
def test_what_is_wanted_is_what_a_step_makes(kind, request):
    program = request.getfixturevalue(kind).program
    wanted = gaps.wanted(program.config)
    for bucket in program.config.buckets:
        if bucket.prefill_tokens:
            continue
        packed = pack(Batch((), ()), program.config.shapes(bucket))
        computed = program.forward(packed)
        made = program.sample(computed) if bucket.decode_tokens == 1 else program.verify(computed)
        drawn = getattr(made, "drawn", made)
        arrays = [packed.buffer, *(getattr(drawn, name) for name in ("token", "told", "logprob", "top_tokens", "top_logprobs"))]
        arrays += [made.counts] if made is not drawn else []
        sizes = Counter(-(-np.asarray(array).nbytes // gaps.UNIT) * gaps.UNIT for array in arrays)
        assert all(wanted[size] >= gaps.ALIVE * count for size, count in sizes.items())


def test_only_gpus_have_them(plain, monkeypatch):
    program = plain.program
    assert program._between == () and not program._gaps
    without = program.beside.held
    monkeypatch.setattr(program_module, "PAIRED", ("cpu",))
    assert program._gaps == gaps.wanted(program.config) and program.beside.held == without + gaps.taken(program._gaps)
