"""How long a kernel takes on the device, however slow the host: many calls in one compiled program, waited for as one.

Dispatching one kernel takes longer than many kernels run. So a program holds N calls. A GPU's own clock says how long it was busy with them
(`device_clock`); elsewhere N grows until dispatch and wait, measured on a program with the same arguments that does nothing, are under
3 % of it. The calls work on different copies of what differs from layer
to layer (`case.rotates`), together larger than the cache, and share the rest as layers do: what an op derives from that alone is
computed once a program. Each call waits for the one before, and what is donated goes around inside the program. The function is jitted
by itself, so it is lowered once. This file does not know what is measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.counters import counted
from pallas_kernels.device_clock import busy_seconds

CACHE = 64 << 20  # bytes; the largest L2 of today's chips
TIMES = 4  # copies are so many times larger
FEWEST, MOST = 4, 64  # copies
FEWEST_CALLS, RUNS = 16, 3  # of a program, and of it in a round, by a device's clock
SHARE = 0.03
HOST, DEVICE = "host", "device"  # clocks
ROUND = 0.05  # seconds

Inputs = dict[str, Any]
Run = Callable[[Inputs], Any]


@dataclass(frozen=True)
class Settings:
    """Rounds of measurement, most calls in a program, and copies of the inputs (None: as many as exceed the cache).

    On a CPU dispatch is short and compiling many calls takes long: few are enough there.
    """

    repeat: int = 3
    most_calls: int | None = None
    copies: int | None = None

    def limit(self) -> int:
        """Most calls in a program on this machine."""
        return self.most_calls or (4 if jax.default_backend() == "cpu" else 512)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, of each round; the calls of a program; the seconds that dispatching it and waiting take by themselves (0 by a
    device's clock); what each call had to do at least, as the case says; whose clock it was."""

    seconds: list[float]
    calls: int
    dispatch: float
    cost: Any
    clock: str = HOST

    @property
    def typical(self) -> float:
        """The median."""
        return median(self.seconds)

    def fields(self) -> dict[str, Any]:
        """As fields of a row."""
        share = self.dispatch / (self.typical * self.calls)
        runs = [round(seconds * 1e6, 3) for seconds in self.seconds]
        return {
            "microseconds": self.typical * 1e6,
            "runs": runs,
            "calls_per_program": self.calls,
            "dispatch_share": share,
            "clock": self.clock,
        }


class Arguments(NamedTuple):
    """Inputs of a program: copies of what is donated and of what differs; what all calls share."""

    donated: list[Inputs]
    turning: list[Inputs]
    shared: Inputs


def measure(case: Any, run: Run, make: Callable[[int], Inputs], settings: Settings) -> Timing:
    """Time `run(inputs)`. make: inputs from a seed; case names those it `donates` and those it `rotates`, and counts its `cost`."""
    first = make(0)
    jax.eval_shape(run, first)  # what is refused is refused before much is made
    cost, arguments = case.cost(first), _arguments(case, first, make, settings.copies)
    del first
    if jax.default_backend() == "gpu":
        rounds, calls, arguments = _by_device(case, run, arguments, settings)
        if rounds:
            return Timing(rounds, calls, 0.0, cost, DEVICE)
    dispatch = _dispatch(arguments)
    calls = 1
    while True:
        program, arguments = _warm(program_of(case, run, arguments, calls), arguments)
        seconds, arguments = _round(program, arguments)
        wanted = math.ceil(1.2 * dispatch / SHARE / max(seconds - dispatch, 1e-6) * calls)
        wanted = min(wanted, settings.limit(), _most_distinct(case, arguments))
        if dispatch <= SHARE * seconds or wanted <= calls:
            break
        calls = wanted
    rounds = []
    for _ in range(settings.repeat):
        seconds, arguments = _round(program, arguments)
        rounds.append(seconds / calls)
    return Timing(rounds, calls, dispatch, cost)


def _by_device(case: Any, run: Run, arguments: Arguments, settings: Settings) -> tuple[list[float], int, Arguments]:
    """Seconds of each round by the device's clock (none if it has none), the calls of a program, and the arguments for what comes next."""
    copies = len(arguments.turning)
    calls = min(copies * -(-FEWEST_CALLS // copies), settings.limit(), _most_distinct(case, arguments))  # each copy as often as the others
    program, arguments = _warm(program_of(case, run, arguments, calls), arguments)
    rounds: list[float] = []

    def some() -> None:
        nonlocal arguments
        for _ in range(RUNS):
            arguments = _once(program, arguments)

    for _ in range(settings.repeat):
        busy = busy_seconds(some)
        if busy is None:
            return [], calls, arguments
        rounds.append(busy / RUNS / calls)
    return rounds, calls, arguments


def program_of(case: Any, run: Run, like: Arguments, calls: int) -> Callable[..., Any]:
    """A jitted function of `Arguments` that makes so many calls and returns what is donated and all other results."""
    copies = len(like.turning)
    one = jax.jit(lambda donated, rest: run(donated | rest))

    def program(donated: list[Inputs], turning: list[Inputs], shared: Inputs) -> tuple[list[Inputs], list[Any]]:
        donated, results, shared = list(donated), [], counted(case, shared)
        for call in range(calls):
            turn, copy = divmod(call, copies)  # in every turn the inputs are paired anew: compilers make equal calls once
            pool = call % len(donated)
            own = {name: turning[(copy + shift * turn) % copies][name] for shift, name in enumerate(turning[0])}
            if results:
                own, results[-1] = jax.lax.optimization_barrier((own, results[-1]))
            result = one(donated[pool], own | shared)
            donated[pool] = {name: getattr(result, name) for name in case.donates}
            results.append([getattr(result, name) for name in result._fields if name not in case.donates] if case.donates else result)
        return donated, results

    return jax.jit(program, donate_argnums=0)


def _arguments(case: Any, first: Inputs, make: Callable[[int], Inputs], copies: int | None) -> Arguments:
    """The inputs of seed 0 and more copies of what rotates."""
    if copies is None:
        nbytes = sum(leaf.nbytes for name in case.rotates for leaf in jax.tree.leaves(first[name]))
        copies = min(max(math.ceil(TIMES * CACHE / nbytes), FEWEST), MOST)
    donated, turning = [], []
    for seed in range(copies):
        inputs = make(seed) if seed else first
        donated.append({name: inputs[name] for name in case.donates})
        if seed < FEWEST or not case.donates:  # beside a donated pool the others are small and just computed: in the cache in any case
            turning.append({name: inputs[name] for name in case.rotates if name not in case.donates})
    return Arguments(donated, turning, {name: value for name, value in first.items() if name not in (*case.donates, *case.rotates)})


def _most_distinct(case: Any, arguments: Arguments) -> int:
    """Calls of which no two are alike, so that the compiler makes them all."""
    copies = len(arguments.turning)
    return 1 << 30 if case.donates else copies * (copies if len(arguments.turning[0]) > 1 else 1)


def _warm(program: Callable[..., Any], arguments: Arguments) -> tuple[Callable[..., Any], Arguments]:
    """Compile, and run a few times: the first runs record and make up the graph of launches."""
    compiled = program.lower(*arguments).compile()  # pyright: ignore[reportFunctionMemberAccess]
    for _ in range(3):
        arguments = _once(compiled, arguments)
    return compiled, arguments


def _once(program: Callable[..., Any], arguments: Arguments) -> Arguments:
    donated, _ = jax.block_until_ready(program(*arguments))
    return arguments._replace(donated=donated)


def _round(program: Callable[..., Any], arguments: Arguments) -> tuple[float, Arguments]:
    """Seconds of one run of a program, over as many as fill a round."""
    runs, start = 0, time.perf_counter()
    while runs == 0 or (runs < 200 and time.perf_counter() - start < ROUND):
        arguments = _once(program, arguments)
        runs += 1
    return (time.perf_counter() - start) / runs, arguments


def _dispatch(arguments: Arguments) -> float:
    """Seconds that a program with the same arguments takes that has nothing to do."""
    tick = jnp.zeros((), jnp.int32)
    idle = jax.jit(lambda arguments, tick: tick + 1, keep_unused=True).lower(arguments, tick).compile()
    found = []
    for _ in range(30):
        start = time.perf_counter()
        jax.block_until_ready(idle(arguments, tick))
        found.append(time.perf_counter() - start)
    return median(found[5:])
