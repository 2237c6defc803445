"""Time of each kernel alone: every op and implementation over the named cases, beside the machine's ceilings measured in the same run.

Ops and implementations are found by `pallas_kernels.dispatch`, cases in each op's `cases.py`. A case's arrays exist in several copies
that are used in turn, so that a cache does not answer; what an op donates is fed back. `floor` is bytes in and out / bandwidth;
`operations` are those of the reference, masked ones included. This file does not know what an op computes.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

from jaxinfer.bench.rows import Report, add_output_arguments
from jaxinfer.console import remark

HELP = "each kernel alone, over its named cases"
LISTS = {"tuning": "TUNING", "tests": "CASES"}


class Job(NamedTuple):
    """One thing to measure."""

    op: str
    implementation: str
    case: Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--op", action="append", metavar="NAME", help="this op only; may be repeated")
    parser.add_argument("--implementation", action="append", metavar="NAME", help="this one only; may be repeated [all but reference]")
    parser.add_argument("--cases", choices=tuple(LISTS), default="tuning", help="those of real models, or the tests' small ones [tuning]")
    parser.add_argument("--case", action="append", metavar="NAME", help="this case only; may be repeated")
    parser.add_argument("--copies", type=int, default=4, metavar="N", help="copies of the inputs that are used in turn [4]")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure everything that was asked for and exists."""
    from jaxinfer.bench import ceilings

    with Report("kernels", args) as report:
        found = [ceilings.measure(dtype) for dtype in ("float32", "bfloat16")]
        for each in found:
            report.add(row="ceiling", **each.fields())
        ceiling = max(found, key=lambda each: each.bandwidth)
        for op, implementation, case in _work(args):
            remark(f"{op} {case.name} {implementation}")
            try:
                measured = _measure(case, implementation, args, ceiling)
                report.add(row="kernel", op=op, case=case.name, implementation=implementation, **measured)
            except NotImplementedError as error:  # a case that this implementation refuses
                remark(f"left out: {error}")
    return 0


def _work(args: argparse.Namespace) -> Iterator[Job]:
    from pallas_kernels import dispatch

    for op in args.op or dispatch.ops():
        for case in getattr(importlib.import_module(f"pallas_kernels.{op}.cases"), LISTS[args.cases]):
            for implementation in args.implementation or [name for name in dispatch.implementations(op) if name != "reference"]:
                if args.case is None or case.name in args.case:
                    yield Job(op, implementation, case)


def _measure(case: Any, implementation: str, args: argparse.Namespace, ceiling: Any) -> dict[str, Any]:
    import jax

    def split(given: dict[str, Any], rest: dict[str, Any]) -> Any:
        return case.run(given | rest, implementation)

    function = jax.jit(split, donate_argnums=0)
    copies = [_divide(case, case.make(seed, implementation)) for seed in range(args.copies)]
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(copies[0])) + _fresh_bytes(jax.eval_shape(split, *copies[0]), case)
    seconds = _seconds(lambda: _turn(function, copies, case), args)
    reference = case.make(0, "reference")
    cost = jax.jit(lambda inputs: case.run(inputs, "reference")).lower(reference).cost_analysis() or {}
    timed = {"microseconds": median(seconds) * 1e6, "floor_microseconds": ceiling.decode_floor(nbytes) * 1e6, "runs": seconds}
    share = ceiling.decode_floor(nbytes) / median(seconds)
    return {"bytes": nbytes, **timed, "share_of_floor": share, "operations": cost.get("flops")}


def _divide(case: Any, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The inputs that are donated, and the others."""
    given = {name: inputs[name] for name in case.donates}
    return [given, {name: value for name, value in inputs.items() if name not in given}]


def _fresh_bytes(result: Any, case: Any) -> int:
    """Bytes of the outputs that are not donated inputs updated in place."""
    import jax

    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves([getattr(result, name) for name in case.donates]))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(result)) - kept


def _turn(function: Callable[..., Any], copies: list[list[dict[str, Any]]], case: Any) -> Any:
    """One call on each copy; what was donated comes back in the result."""
    result = None
    for copy in copies:
        result = function(*copy)
        copy[0] = {name: getattr(result, name) for name in case.donates}
    return result


def _seconds(turn: Callable[[], Any], args: argparse.Namespace) -> list[float]:
    """Seconds of one call, measured `repeat` times over turns that fill about 50 ms."""
    import jax

    jax.block_until_ready(turn())
    start = time.perf_counter()
    jax.block_until_ready(turn())
    turns = max(1, min(100, int(0.05 / max(time.perf_counter() - start, 1e-6))))
    found = []
    for _ in range(args.repeat):
        start = time.perf_counter()
        jax.block_until_ready([turn() for _ in range(turns)][-1])
        found.append((time.perf_counter() - start) / (turns * args.copies))
    return found
