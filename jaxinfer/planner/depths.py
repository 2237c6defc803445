"""Compiling for a choice: every program in full, or the deep ones at two small depths, from which the whole depth follows on a line.

A forward pass is its layers one after the other, so code and collectives grow by the same amount with each of them and temporaries with
none, or nearly: a line through two depths tells of the whole for a fraction of the time, and of models that no compiler would take since
they do not fit. What was compiled at which depth is kept and said. Layers may come in patterns (sliding windows in some): depths are whole
numbers of them. A model whose files say how it is quantised, and one that is not much deeper, is compiled in full.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

from jaxinfer.planner import collectives
from jaxinfer.planner.collectives import Collective
from jaxinfer.planner.estimate import Choice
from jaxinfer.step.buckets import Bucket
from jaxinfer.step.program import Program
from jaxinfer.step.sizes import ProgramSize, beside

LEAST = 2  # layers of the smaller depth
SPARED = 4  # how many times the layers of the deeper one a model has at least

Progress = Callable[[str, int, int], None]


class Depths(NamedTuple):
    """Layers of the two programs that were compiled in place of a whole one."""

    few: int
    more: int

    def line(self, few: float, more: float, layers: int) -> int:
        """What a number of the two comes to for so many layers; no less than what was seen."""
        return max(round(few), round(more), round(more + (more - few) / (self.more - self.few) * (layers - self.more)))


@dataclass(frozen=True)
class Compiled:
    """What compiling for a choice told: program sizes by key, texts' collectives by key, seconds of each (by name) and in all.

    program: of the whole model. depths: what forward passes were compiled at, None for whole ones.
    """

    program: Program
    sizes: Mapping[Any, ProgramSize]
    collectives: Mapping[Any, tuple[Collective, ...]]
    each: Mapping[str, float]
    seconds: float
    depths: Depths | None = None

    @property
    def needed(self) -> int:
        """Bytes that the whole list of programs needs on a device."""
        return beside(self.sizes, self.program.config.keys).total


def compile_for(choice: Choice, pages: int, *, everything: bool, progress: Progress) -> Compiled:
    """Compile for a choice, with a pool of so many pages: the programs that set its memory, deep ones at two depths, or all in full."""
    begun = time.perf_counter()
    with choice.target():
        program = _program(choice, pages)
        depths = None if everything else depths_of(choice, program)
        keys = program.config.keys if everything else program.config.largest
        if depths is None:
            program.compile(progress, keys)
            made = Compiled(program, program.sizes, texts(program), program.compile_seconds, 0.0)
        else:
            made = _extrapolated(choice, program, depths, progress)
    return replace(made, seconds=time.perf_counter() - begun)


def depths_of(choice: Choice, program: Program) -> Depths | None:
    """The depths to compile at; None where a model is to be compiled in full."""
    shapes, windows = program.config.graph.config.attention_shapes, choice.wish.values.get("layer_types")
    layers = list(zip(shapes, windows if isinstance(windows, list) and len(windows) == len(shapes) else shapes, strict=True))
    period = next((size for size in range(1, len(layers)) if layers[size:] == layers[:-size]), len(layers))
    few = period * -(-LEAST // period)
    spared = choice.wish.folder is None and len(layers) >= SPARED * 2 * few
    return Depths(few, 2 * few) if spared else None


def shallower(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """A config.json of the same model with so many layers: lists with an entry for each layer are cut too."""
    whole = values["num_hidden_layers"]
    cut = {name: value[:layers] if isinstance(value, list) and len(value) == whole else value for name, value in values.items()}
    return {**cut, "num_hidden_layers": layers}


def texts(program: Program) -> dict[Any, tuple[Collective, ...]]:
    """The collectives of the compiled forward passes."""
    return {key: collectives.in_text(program.text(key)) for key in program.sizes if isinstance(key, Bucket)}


def _program(choice: Choice, pages: int) -> Program:
    sizing = choice.sizing()
    return sizing.program(replace(sizing.empty_pool, pages=pages + 1))


def _extrapolated(choice: Choice, program: Program, depths: Depths, progress: Progress) -> Compiled:
    """Forward passes at two depths here, what does not depend on the depth beside them on a thread."""
    pages, values = program.config.pool.pages - 1, choice.wish.values
    keys = program.config.largest
    forwards, rest = ([key for key in keys if isinstance(key, Bucket) == deep] for deep in (True, False))
    total, landed = 2 * len(forwards) + len(rest), count(1)
    progress("compile", 0, total)

    def tell(_stage: str, done: int, _total: int) -> None:
        if done:
            progress("compile", next(landed), total)

    def others() -> None:
        with choice.target():
            program.compile(tell, rest)

    with ThreadPoolExecutor(1) as thread:
        beside_them = thread.submit(others)
        shallow = []
        for layers in depths:
            wish = replace(choice.wish, values=shallower(values, layers))
            shallow.append(_program(replace(choice, wish=wish), pages))
            shallow[-1].compile(tell, forwards)
        beside_them.result()
    layers = len(program.config.graph.config.attention_shapes)
    few, more = shallow
    pairs = {key: (few.sizes[key], more.sizes[key]) for key in forwards}
    found = {key: ProgramSize(*(depths.line(*sizes, layers) for sizes in _numbers(pair))) for key, pair in pairs.items()}
    links = {key: _grown(*(texts(each)[key] for each in shallow), depths, layers) for key in forwards}
    seconds = {str(key): few.compile_seconds[str(key)] + more.compile_seconds[str(key)] for key in forwards}
    return Compiled(program, {**found, **program.sizes}, links, {**seconds, **program.compile_seconds}, 0.0, depths)


def _numbers(pair: Iterable[ProgramSize]) -> Iterable[tuple[int, ...]]:
    return zip(*((size.temporary, size.output, size.code) for size in pair), strict=True)


def _grown(few: tuple[Collective, ...], more: tuple[Collective, ...], depths: Depths, layers: int) -> tuple[Collective, ...]:
    counted = [{(each.kind, each.bytes): each.count for each in one} for one in (few, more)]
    return tuple(Collective(*key, depths.line(counted[0].get(key, 0), count, layers)) for key, count in sorted(counted[1].items()))
