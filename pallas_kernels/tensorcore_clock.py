"""How long a kernel for TPUs would take: its own trace is walked, scalars computed and everything else only counted. A model, no timing.

The walk follows the loops and branches that the kernel's scalars lead to, so copies, their bytes, what hides behind what, steps and tiles
are those of the kernel that is compiled: no second arithmetic can differ from it. What they cost is assumed, the same for all generations:

    a copy       bytes at the core's share of the bandwidth, one copy after the other, and LATENCY until it can be used
    a product    tiles of the matrix unit's side, filled or not; each takes as many rows as there are, or as loading it takes (its side)
    vectors      an operation on an element at the vector unit's rate, loads and stores beside it at theirs
    scalars      one a cycle; a loop's step LOOP cycles, one that multiplied DRAIN cycles more

Matrix unit, vector unit, loads and stores overlap between two points where the kernel waits, starts a copy or begins a step. Registers that
spill, conflicts and XLA's work around the kernel are not in it. Rank candidates with it; do not quote its microseconds as performance.
"""

import functools
import math
import operator
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.generations import Generation
from pallas_kernels.tensorcore import LANES, Recorded

LATENCY = 1e-6  # seconds until a copy that waits for nobody has arrived, its bytes apart
LOOP, DRAIN = 10, 200  # cycles
VECTOR, ALUS = 8 * LANES, 4  # elements of a vector register, and vectors computed in a cycle
TRANSCENDENTAL = {"exp": 4, "tanh": 4, "log": 4, "div": 4}  # of that rate
FREE = {"broadcast_in_dim", "reshape", "squeeze", "slice", "iota", "multiple_of", "bitcast_convert_type", "reshard", "transpose"}
PASSES = {"float32": 6}  # of the matrix unit, at the highest precision

SCALARS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "max": max, "min": min, "neg": operator.neg,
    "div": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1), "rem": lambda a, b: int(math.fmod(a, b)),
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "not": operator.not_, "and": operator.and_, "or": operator.or_, "select_n": lambda which, *cases: cases[int(which)],
    "clamp": lambda low, x, high: min(max(x, low), high), "multiple_of": lambda x: x,
    "convert_element_type": lambda x: x, "squeeze": lambda x: x, "broadcast_in_dim": lambda x: x, "reshard": lambda x: x,
}  # fmt: skip


class Memory:
    """A ref: scalars that are known, or only a shape."""

    def __init__(self, aval: Any, data: np.ndarray | None = None) -> None:
        self.shape, self.dtype, self.data = aval.shape, aval.dtype, data


class Program(NamedTuple):
    """A kernel's trace and the scalars that it is given."""

    body: Any
    scalars: list[np.ndarray]
    cores: int


def program(record: Recorded) -> Program:
    """Of a call that was recorded with scalars that are known."""
    given = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in record.scalars]
    traced = jax.make_jaxpr(record.kernel)(*given, *record.rest).jaxpr
    body = next(eqn for eqn in traced.eqns if eqn.primitive.name == "pallas_call").params["jaxpr"]
    return Program(body, [np.array(x) for x in record.scalars], record.call.cores)


def seconds(program: Program, generation: Generation) -> float:
    """Of the slowest core. Raises ValueError for a kernel whose way depends on what is no scalar, or that does what is not known here."""
    cores = (Core(generation, program.cores, number) for number in range(program.cores))
    return max(core.run(program.body, program.scalars) for core in cores)


class Core:
    """One core walks through a kernel."""

    def __init__(self, generation: Generation, cores: int, number: int) -> None:
        self.generation, self.cores, self.number = generation, cores, number
        self.now = self.bus = 0.0
        self.busy = {"matrix": 0.0, "vector": 0.0, "ports": 0.0}
        self.copies: dict[Any, deque[float]] = defaultdict(deque)

    def run(self, body: Any, scalars: list[np.ndarray]) -> float:
        """Seconds until the last copy that is waited for is there."""
        refs = []
        for number, var in enumerate(body.invars):
            data = scalars[number] if number < len(scalars) else None
            if data is None and "smem" in str(getattr(var.aval, "memory_space", "")):
                data = np.zeros(var.aval.shape, np.int64)
            refs.append(Memory(var.aval, data))
        self._walk(body, [], refs)
        self._settle()
        return self.now

    def _walk(self, jaxpr: Any, consts: Sequence[Any], args: list[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        for step in _steps(jaxpr):
            results = getattr(self, step.method)(step, [env[var] if var is not None else value for var, value in step.reads])
            env.update(zip(step.eqn.outvars, results, strict=True))
        return [env[var] if var is not None else value for var, value in _reads(jaxpr.outvars)]

    def _on_scalars(self, step: "Eqn", values: list[Any]) -> list[Any]:
        self.now += 1 / self.generation.clock
        if None in values:
            return [None] * len(step.eqn.outvars)
        name = step.eqn.primitive.name
        if name not in SCALARS:
            raise ValueError(f"the clock does not know the operation {name!r} on scalars")
        return [SCALARS[name](*values)]

    def _on_vectors(self, step: "Eqn", _: list[Any]) -> list[Any]:
        self.busy["vector"] += step.size / (VECTOR * ALUS * self.generation.clock)
        return [None] * len(step.eqn.outvars)

    def _settle(self, *, step: bool = False) -> None:
        """What was begun is done: the units worked side by side."""
        cycles = (DRAIN if self.busy["matrix"] else 0) + (LOOP if step else 0)
        self.now += max(self.busy.values()) + cycles / self.generation.clock
        self.busy = dict.fromkeys(self.busy, 0.0)

    def _program_id(self, _: "Eqn", __: list[Any]) -> list[Any]:
        return [self.number]

    def _get(self, step: "Eqn", values: list[Any]) -> list[Any]:
        if values[0].data is None:
            self.busy["ports"] += step.size / (4 * VECTOR * self.generation.clock)
            return [None]
        self.now += 1 / self.generation.clock
        return [_scalar(values[0].data[tuple(values[1:])])]

    def _swap(self, step: "Eqn", values: list[Any]) -> list[Any]:
        if values[0].data is None:
            self.busy["ports"] += step.size / (4 * VECTOR * self.generation.clock)
            return [None]
        self.now += 1 / self.generation.clock
        old, values[0].data[tuple(values[2:])] = _scalar(values[0].data[tuple(values[2:])]), values[1]
        return [old]

    def _dot_general(self, step: "Eqn", _: list[Any]) -> list[Any]:
        (left, right), chip, params = (var.aval for var in step.eqn.invars), self.generation, step.eqn.params
        (inner, inner_right), (batch, batch_right) = params["dimension_numbers"]
        rows = math.prod(left.shape) // math.prod(left.shape[axis] for axis in (*inner, *batch))
        columns = math.prod(right.shape) // math.prod(right.shape[axis] for axis in (*inner_right, *batch_right))
        depth, times = math.prod(left.shape[axis] for axis in inner), math.prod(left.shape[axis] for axis in batch)
        tiles = times * -(-depth // chip.side) * -(-columns // chip.side) * PASSES.get(str(left.dtype), 1)
        rate = (chip.int8_rate if left.dtype == jnp.int8 else chip.bf16_rate) / self.cores
        self.busy["matrix"] += tiles * max(rows, chip.side) * 2 * chip.side**2 / rate
        return [None]

    def _dma_start(self, step: "Eqn", values: list[Any]) -> list[Any]:
        self._settle()
        self.bus = max(self.bus, self.now) + step.size * self.cores / self.generation.bandwidth
        self.copies[step.semaphore(values)].append(self.bus + LATENCY)
        return []

    def _dma_wait(self, step: "Eqn", values: list[Any]) -> list[Any]:
        self._settle()
        self.now = max(self.now, self.copies[step.semaphore(values)].popleft())
        return []

    def _cond(self, step: "Eqn", values: list[Any]) -> list[Any]:
        index, *args = values
        if index is None:
            raise ValueError("a branch of the kernel depends on what is no scalar")
        chosen = step.eqn.params["branches"][min(max(int(index), 0), len(step.eqn.params["branches"]) - 1)]
        return self._walk(chosen.jaxpr, chosen.consts, args)

    def _while(self, step: "Eqn", values: list[Any]) -> list[Any]:
        (test, body), params = (step.eqn.params[f"{name}_jaxpr"] for name in ("cond", "body")), step.eqn.params
        first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        carry = values[second:]
        while True:
            (more,) = self._walk(test.jaxpr, test.consts, [*values[:first], *carry])
            if more is None:
                raise ValueError("a loop of the kernel depends on what is no scalar")
            if not more:
                return carry
            carry = self._walk(body.jaxpr, body.consts, [*values[first:second], *carry])
            self._settle(step=True)

    def _scan(self, step: "Eqn", values: list[Any]) -> list[Any]:
        body = step.eqn.params["jaxpr"]
        if any(given.aval.shape != own.aval.shape for given, own in zip(step.eqn.invars, body.jaxpr.invars, strict=True)):
            raise ValueError("the clock does not know scans over arrays inside a kernel")
        count = len(values) - len(body.jaxpr.outvars)
        consts, carry = values[:count], values[count:]
        length, steady, now = step.eqn.params["length"], _steady(body.jaxpr), self.now
        for _ in range(min(length, 2) if steady else length):
            now = self.now
            carry = self._walk(body.jaxpr, body.consts, [*consts, *carry])
            self._settle(step=True)
        if not steady or length <= 2:
            return carry
        self.now += (length - 2) * (self.now - now)
        return [None] * len(carry)

    def _jit(self, step: "Eqn", values: list[Any]) -> list[Any]:
        inside = step.eqn.params["jaxpr"]
        return self._walk(inside.jaxpr, inside.consts, values)


class Eqn(NamedTuple):
    """A step of a trace: which method of a core takes it; what it reads (a variable, or None and a number); elements or bytes of it."""

    eqn: Any
    method: str
    reads: list[tuple[Any, Any]]
    size: float
    places: tuple[int, ...] = ()

    def semaphore(self, values: list[Any]) -> tuple[Any, ...]:
        """Which one a copy is told to: the ref and the indices, where they stand among the values."""
        return id(values[self.places[0]]), *(values[place] for place in self.places[1:])


METHODS = {"get", "swap", "dot_general", "dma_start", "dma_wait", "cond", "while", "scan", "jit", "program_id"}


@functools.cache
def _steps(jaxpr: Any) -> list[Eqn]:
    return [_step(eqn) for eqn in jaxpr.eqns]


def _step(eqn: Any) -> Eqn:
    name, reads, avals = eqn.primitive.name, _reads(eqn.invars), [var.aval for var in (*eqn.invars, *eqn.outvars)]
    if name in ("dma_start", "dma_wait"):
        source, _, semaphore, *_ = jax.tree.unflatten(eqn.params["tree"], range(len(reads)))
        aval = avals[getattr(source, "ref", source)]
        shape = aval.shape
        if hasattr(source, "ref"):
            (indexer,) = source.transforms
            shape = tuple(index.size for index in indexer.indices if hasattr(index, "stride"))
        places = (semaphore.ref, *semaphore.transforms[0].indices) if hasattr(semaphore, "ref") else (semaphore,)
        return Eqn(eqn, f"_{name}", reads, math.prod(shape) * jnp.dtype(aval.dtype).itemsize, places)
    if name in ("get", "swap"):
        aval = eqn.outvars[0].aval
        return Eqn(eqn, f"_{name}", reads, math.prod(aval.shape) * jnp.dtype(aval.dtype).itemsize)
    if name in METHODS:
        return Eqn(eqn, f"_{name}", reads, 0)
    if any(hasattr(getattr(each, "jaxpr", each), "eqns") for each in eqn.params.values()):
        raise ValueError(f"the clock does not know what {name!r} does with a program inside a kernel")
    if all(not aval.shape for aval in avals):
        return Eqn(eqn, "_on_scalars", reads, 0)
    size = 0 if name in FREE else max(math.prod(aval.shape) for aval in avals) * TRANSCENDENTAL.get(name, 1)
    return Eqn(eqn, "_on_vectors", reads, size)


def _reads(variables: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [(None, _scalar(var.val)) if hasattr(var, "val") else (var, None) for var in variables]


@functools.cache
def _steady(jaxpr: Any) -> bool:
    """Whether each step of a loop takes the same time, whatever its scalars are."""
    inside = [each for eqn in jaxpr.eqns for each in eqn.params.values() if hasattr(getattr(each, "jaxpr", each), "eqns")]
    names = {eqn.primitive.name for eqn in jaxpr.eqns}
    scalars = any(eqn.primitive.name == "swap" and not eqn.outvars[0].aval.shape for eqn in jaxpr.eqns)
    return not scalars and not names & {"dma_start", "dma_wait", "cond", "while"} and all(_steady(each.jaxpr) for each in inside)


def _scalar(x: Any) -> Any:
    """A known number, or None for an array."""
    return None if np.ndim(x) else np.asarray(x).item()
