"""How long a kernel for TPUs would take: its own trace is walked, scalars computed and everything else only counted. A model, no timing.

The walk follows the loops and branches that the kernel's scalars lead to, so copies, their bytes, what hides behind what, steps and tiles are
those of the kernel that is compiled, and no second arithmetic can differ from it. What they cost is assumed, the same for all generations:

    a copy       bytes at the core's share of the bandwidth, one copy after the other, and LATENCY until it can be used
    a product    tiles of the matrix unit's side, filled or not; each takes as many rows as there are, or as loading it takes (its side)
    vectors      an operation on an element at the vector unit's rate, loads and stores beside it at theirs
    scalars      one a cycle; a loop's step LOOP cycles, one that multiplied DRAIN cycles more

Matrix unit, vector unit, loads and stores overlap between two points where the kernel waits, starts a copy or begins a step. Registers that
spill, conflicts and XLA's work around the kernel are not in it. Rank candidates with it; do not quote its microseconds as performance.
"""

import math
import operator
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.generations import UNITS, Generation
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

    def _walk(self, jaxpr: Any, consts: list[Any], args: list[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        for eqn in jaxpr.eqns:
            values = [_scalar(var.val) if hasattr(var, "val") else env[var] for var in eqn.invars]
            step = getattr(self, f"_{eqn.primitive.name}", None)
            results = step(eqn, values) if step is not None else self._compute(eqn, values)
            env.update(zip(eqn.outvars, results, strict=True))
        return [_scalar(var.val) if hasattr(var, "val") else env[var] for var in jaxpr.outvars]

    def _compute(self, eqn: Any, values: list[Any]) -> list[Any]:
        """An operation on scalars or vectors."""
        name = eqn.primitive.name
        if any(hasattr(getattr(each, "jaxpr", each), "eqns") for each in eqn.params.values()):
            raise ValueError(f"the clock does not know what {name!r} does with a program inside a kernel")
        shapes = [var.aval for var in (*eqn.invars, *eqn.outvars)]
        if all(not aval.shape for aval in shapes):
            self.now += 1 / self.generation.clock
            if None in values:
                return [None] * len(eqn.outvars)
            if name not in SCALARS:
                raise ValueError(f"the clock does not know the operation {name!r} on scalars")
            return [SCALARS[name](*values)]
        if name not in FREE:
            size = max(math.prod(aval.shape) for aval in shapes)
            self.busy["vector"] += size * TRANSCENDENTAL.get(name, 1) / (VECTOR * ALUS * self.generation.clock)
        return [None] * len(eqn.outvars)

    def _settle(self, *, step: bool = False) -> None:
        """What was begun is done: the units worked side by side."""
        cycles = (DRAIN if self.busy["matrix"] else 0) + (LOOP if step else 0)
        self.now += max(self.busy.values()) + cycles / self.generation.clock
        self.busy = dict.fromkeys(self.busy, 0.0)

    def _program_id(self, eqn: Any, _: list[Any]) -> list[Any]:
        return [self.number]

    def _get(self, eqn: Any, values: list[Any]) -> list[Any]:
        memory, place = _place(eqn.params["tree"], values, 1)
        if memory.data is not None and not eqn.outvars[0].aval.shape:
            self.now += 1 / self.generation.clock
            return [_scalar(memory.data[place])]
        self._move(eqn.outvars[0].aval)
        return [None]

    def _swap(self, eqn: Any, values: list[Any]) -> list[Any]:
        memory, place = _place(eqn.params["tree"], values, 2)
        if memory.data is None:
            self._move(eqn.invars[1].aval)
            return [None]
        self.now += 1 / self.generation.clock
        old, memory.data[place] = _scalar(memory.data[place]), values[1]
        return [old]

    def _addupdate(self, eqn: Any, values: list[Any]) -> list[Any]:
        self._move(eqn.invars[1].aval)
        self._move(eqn.invars[1].aval)
        return []

    def _move(self, aval: Any) -> None:
        """A load or a store of 32-bit vectors."""
        self.busy["ports"] += math.prod(aval.shape) * jnp.dtype(aval.dtype).itemsize / (4 * VECTOR * self.generation.clock)

    def _dot_general(self, eqn: Any, _: list[Any]) -> list[Any]:
        (left, right), chip = (var.aval for var in eqn.invars), self.generation
        (inner, inner_right), (batch, batch_right) = eqn.params["dimension_numbers"]
        rows = math.prod(left.shape) // math.prod(left.shape[axis] for axis in (*inner, *batch))
        columns = math.prod(right.shape) // math.prod(right.shape[axis] for axis in (*inner_right, *batch_right))
        depth, times = math.prod(left.shape[axis] for axis in inner), math.prod(left.shape[axis] for axis in batch)
        tiles = times * -(-depth // chip.side) * -(-columns // chip.side) * PASSES.get(str(left.dtype), 1)
        rate = (chip.int8_rate if left.dtype == jnp.int8 else chip.bf16_rate) / self.cores
        self.busy["matrix"] += tiles * max(rows, chip.side) * 2 * chip.side**2 / rate
        return [None]

    def _dma_start(self, eqn: Any, values: list[Any]) -> list[Any]:
        self._settle()
        source, _, semaphore, *_ = jax.tree.unflatten(eqn.params["tree"], values)
        memory, shape = _part(source)
        size = math.prod(shape) * jnp.dtype(memory.dtype).itemsize
        self.bus = max(self.bus, self.now) + size * self.cores / self.generation.bandwidth
        self.copies[_name(semaphore)].append(self.bus + LATENCY)
        return []

    def _dma_wait(self, eqn: Any, values: list[Any]) -> list[Any]:
        self._settle()
        _, _, semaphore, *_ = jax.tree.unflatten(eqn.params["tree"], values)
        self.now = max(self.now, self.copies[_name(semaphore)].popleft())
        return []

    def _cond(self, eqn: Any, values: list[Any]) -> list[Any]:
        index, *args = values
        if index is None:
            raise ValueError("a branch of the kernel depends on what is no scalar")
        chosen = eqn.params["branches"][min(max(int(index), 0), len(eqn.params["branches"]) - 1)]
        return self._walk(chosen.jaxpr, chosen.consts, args)

    def _while(self, eqn: Any, values: list[Any]) -> list[Any]:
        (test, body), params = (eqn.params[f"{name}_jaxpr"] for name in ("cond", "body")), eqn.params
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

    def _scan(self, eqn: Any, values: list[Any]) -> list[Any]:
        body = eqn.params["jaxpr"]
        if any(given.aval.shape != own.aval.shape for given, own in zip(eqn.invars, body.jaxpr.invars, strict=True)):
            raise ValueError("the clock does not know scans over arrays inside a kernel")
        count = len(values) - len(body.jaxpr.outvars)
        consts, carry = values[:count], values[count:]
        for _ in range(eqn.params["length"]):
            carry = self._walk(body.jaxpr, body.consts, [*consts, *carry])
            self._settle(step=True)
        return carry

    def _jit(self, eqn: Any, values: list[Any]) -> list[Any]:
        inside = eqn.params["jaxpr"]
        return self._walk(inside.jaxpr, inside.consts, values)


def _scalar(x: Any) -> Any:
    """A known number, or None for an array."""
    return None if np.ndim(x) else np.asarray(x).item()


def _place(tree: Any, values: list[Any], first: int) -> tuple[Memory, tuple[Any, ...]]:
    """The ref of a load or store, and the indices of an element where it is one."""
    transforms = jax.tree.unflatten(tree, values[first:])
    return values[0], tuple(transforms[0].indices) if transforms else ()


def _part(ref: Any) -> tuple[Memory, tuple[int, ...]]:
    """A ref, and the shape of the part of it that is meant."""
    if isinstance(ref, Memory):
        return ref, ref.shape
    (indexer,) = ref.transforms
    return ref.ref, tuple(index.size for index in indexer.indices if hasattr(index, "stride"))


def _name(semaphore: Any) -> tuple[Any, ...]:
    if isinstance(semaphore, Memory):
        return (id(semaphore),)
    return (id(semaphore.ref), *semaphore.transforms[0].indices)
