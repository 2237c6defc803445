"""Time of each kernel alone: every op and implementation over the named cases, beside what else could do the work and the machine's
ceilings, all measured in the same run.

Ops and implementations are found by `pallas_kernels.dispatch`, cases in each op's `cases.py`, peers in `kernel_peers.py`. Times are the
device's (`pallas_kernels/timing.py`). A case's `cost` counts the bytes that must be moved and the useful operations;
`share_of_bandwidth` and `share_of_matmul` compare them with the ceilings. `times_peer` is the peer's time over this row's: above 1 this
row is the faster one (`times_contiguous`: over the same implementation's attention without pages). A goal that is missed on the card it
is for (`kernel_goals.py`) makes the exit code 1. This file does not know what an op computes.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from jaxinfer.bench import kernel_goals
from jaxinfer.bench.rows import Report, add_output_arguments
from jaxinfer.config import ConfigError
from jaxinfer.console import remark, warn

HELP = "each kernel alone, over its named cases, beside its peers"
LISTS = {"tuning": "TUNING", "bench": "BENCH", "tests": "CASES"}


class Job(NamedTuple):
    """One thing to measure: who it is in rows, how it is timed, and what it raises for a case that it refuses."""

    op: str
    case: Any
    implementation: str
    time: Callable[[Any], Any]
    refusals: tuple[type[Exception], ...] = (NotImplementedError,)


def names(text: str) -> list[str]:
    """`a,b` as a list."""
    return [name for part in text.split(",") if (name := part.strip())]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    several: dict[str, Any] = {"action": "extend", "type": names, "metavar": "NAME[,NAME]"}
    parser.add_argument("--op", **several, help="these ops only; may be repeated")
    parser.add_argument("--implementation", **several, help="these only, peers among them; may be repeated [all but reference]")
    listed = "those of real models, those that goals speak of, or the tests' small ones [tuning]"
    parser.add_argument("--cases", choices=tuple(LISTS), default="tuning", help=listed)
    parser.add_argument("--case", **several, help="these cases only; may be repeated")
    parser.add_argument("--copies", type=int, metavar="N", help="copies of the inputs that are used in turn [more than a cache holds]")
    parser.add_argument("--calls", type=int, metavar="N", help="most calls in one compiled program [512; 4 on a CPU]")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure everything that was asked for and exists; 1 if a goal is missed."""
    from jaxinfer.bench import ceilings
    from pallas_kernels.timing import Settings

    jobs, settings = list(work(args)), Settings(args.repeat, args.calls, args.copies)
    with Report("kernels", args) as report:
        found = {dtype: ceilings.measure(dtype) for dtype in ("float32", "bfloat16")}
        for each in found.values():
            report.add(row="ceiling", **each.fields())
        rows: list[dict[str, Any]] = []
        for job in jobs:
            remark(f"{job.op} {job.case.name} {job.implementation}")
            try:
                timing = job.time(settings)
            except job.refusals as error:  # a case that this implementation refuses
                (remark if isinstance(error, NotImplementedError) else warn)(f"{job.implementation} left out: {_first_line(error)}")
                continue
            row = {"row": "kernel", "op": job.op, "case": job.case.name, "implementation": job.implementation, **timing.fields()}
            row |= _against_ceilings(job.case, timing, found)
            row |= _against_others(row, rows)
            row |= kernel_goals.judge(kernel_goals.find(job.op, job.case), row, report.stamp["device"])
            rows.append(row)
            report.add(**row)
    return int(any(row["reached"] is False for row in rows))


def work(args: argparse.Namespace) -> Iterator[Job]:
    """The jobs that were asked for, those of one case together, its peers first.

    Raises:
        ConfigError: an op or a case that does not exist.
    """
    from pallas_kernels import dispatch

    ops = args.op or dispatch.ops()
    _check_known("op", ops, dispatch.ops())
    cases = {op: getattr(importlib.import_module(f"pallas_kernels.{op}.cases"), LISTS[args.cases], ()) for op in ops}
    _check_known("case", args.case or (), [case.name for several in cases.values() for case in several])
    for op in ops:
        for case in cases[op]:
            if args.case is None or case.name in args.case:
                yield from (job for job in _sides(op, case) if job.implementation in (args.implementation or [job.implementation]))


def _sides(op: str, case: Any) -> Iterator[Job]:
    """Everyone who could do a case's work."""
    from jaxinfer.bench import kernel_peers
    from pallas_kernels import dispatch, timing

    for name, peer in kernel_peers.peers(op).items():
        yield Job(op, case, name, partial(peer, case), kernel_peers.UNFIT)
    for name in dispatch.implementations(op):
        if name != "reference":
            yield Job(op, case, name, partial(timing.measure, case, partial(_call, case, name), partial(_make, case, name)))


def _call(case: Any, implementation: str, inputs: dict[str, Any]) -> Any:
    return case.run(inputs, implementation)


def _make(case: Any, implementation: str, seed: int) -> dict[str, Any]:
    return case.make(seed, implementation)


def _against_ceilings(case: Any, timing: Any, ceilings: dict[str, Any]) -> dict[str, Any]:
    """What had to be done, how fast that was, and shares of what the machine can do."""
    bandwidth, (nbytes, operations) = max(each.bandwidth for each in ceilings.values()), timing.cost
    matmul = ceilings["float32" if case.dtype == "float32" else "bfloat16"].matmul
    floor, rate = nbytes / bandwidth, operations / timing.typical
    moved = {"bytes": nbytes, "floor_microseconds": floor * 1e6, "share_of_bandwidth": floor / timing.typical}
    return {**moved, "operations": operations, "tflops": rate / 1e12, "share_of_matmul": rate / matmul}


def _against_others(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of what was measured before of the same case to this row."""
    from jaxinfer.bench.kernel_peers import CONTIGUOUS, peers

    times = {other["implementation"]: other["microseconds"] for other in rows if (other["op"], other["case"]) == (row["op"], row["case"])}
    peer = next((times[name] for name in peers(row["op"]) if name in times and not name.startswith(CONTIGUOUS)), None)
    found = {"times_peer": peer, "times_contiguous": times.get(f"{CONTIGUOUS}{row['implementation']}")}
    return {name: None if other is None else other / row["microseconds"] for name, other in found.items()}


def _check_known(kind: str, asked: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ConfigError(f"unknown {kind} {unknown[0]!r}; there are: {', '.join(known)}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
