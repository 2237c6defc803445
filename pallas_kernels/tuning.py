"""Block sizes: from a table of rows (measured, else modelled), else from the implementation's heuristic, else an error. And the tuner.

A row says for which op, implementation and key (shapes and dtype) which sizes were fastest, on which device, with which jax, when, and
how many microseconds they took: `measured` there, or `modelled` for a TPU that was not there, whose compiler took them (`modelling`). A
measured row always wins. Rows stand in `tuned/<device>/<op>.json` of this package and in the user's cache folder, which wins.

    python -m pallas_kernels.tuning --op paged_attention [--implementation xla] [--case NAME] [--out FILE]
    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m pallas_kernels.tuning --op paged_attention --for v5e,v6e [--case NAME] [--out FOLDER]

The first runs every candidate of the implementation over the op's tuning cases and writes the fastest ones; the second needs libtpu and no
TPU. Knows no op by name: an implementation offers `heuristic(platform, key)` and `candidates(platform, key)`, the op's cases.py offers
`TUNING`, a tuple of cases, and maybe `BENCH`, more of them, which are tuned if they are named.
"""

import argparse
import datetime
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import dispatch, generations, timing

Sizes = dict[str, int]
Key = dispatch.Key
Measure = Callable[[Any, str, Sizes], float]

MEASURED, MODELLED = "measured", "modelled"
SHIPPED = Path(__file__).parent / "tuned"

_forced: ContextVar[Sizes | None] = ContextVar("pallas_kernels_forced_sizes", default=None)


@dataclass(frozen=True)
class Row:
    """The sizes that were fastest for a key, and where, with what, when, and how fast; source: MEASURED or MODELLED (then by which compiler
    they were compiled, and on no chip)."""

    op: str
    implementation: str
    key: Key
    sizes: Sizes
    device: str
    jax: str
    date: str
    microseconds: float
    source: str = MEASURED
    compiler: str = ""

    def __post_init__(self) -> None:
        if self.source not in (MEASURED, MODELLED):
            raise ValueError(f"the source of a row is {MEASURED!r} or {MODELLED!r}, not {self.source!r}")


def sizes(op: str, implementation: str, target: dispatch.Target, key: Key) -> Sizes:
    """Block sizes for a key: measured ones, else modelled ones, else the heuristic's. Raises NotImplementedError when none has any."""
    forced = _forced.get()
    if forced is not None:
        return forced
    found = [row for row in table(op, target.device) if row.implementation == implementation and row.key == key]
    if found:
        return min(found, key=lambda row: row.source != MEASURED).sizes
    guess = _module(op, implementation).heuristic(target.platform, key)
    if guess is None:
        raise NotImplementedError(
            f"{op}: the {implementation!r} implementation has no block sizes for {key} on {target.device}; "
            f"measure them: python -m pallas_kernels.tuning --op {op} --implementation {implementation}"
        )
    return guess


@contextmanager
def forced(chosen: Sizes) -> Iterator[None]:
    """Inside, every op is traced with these sizes."""
    token = _forced.set(chosen)
    try:
        yield
    finally:
        _forced.reset(token)


def user_folder() -> Path:
    """Where the tuner writes by default and where rows are looked for first."""
    return Path.home() / ".cache" / "jaxinfer" / "tuned"


def table_file(folder: Path, device: str, op: str) -> Path:
    """The file of a folder that holds the rows of one device and op; a generation of TPU has one, whichever way its kind is written."""
    generation = generations.find(device)
    kind = device if generation is None else generation.kind
    return folder / "-".join(kind.lower().split()) / f"{op}.json"


@functools.cache
def table(op: str, device: str) -> tuple[Row, ...]:
    """All rows known for a device and op, the user's first. Raises ValueError for a file that does not hold rows."""
    folders = (user_folder(), SHIPPED)
    return tuple(row for folder in folders for row in read(table_file(folder, device, op)))


def read(file: Path) -> tuple[Row, ...]:
    """The rows of one file; none when there is no such file. Raises ValueError naming the file when it holds anything else."""
    if not file.exists():
        return ()
    try:
        return tuple(Row(**row) for row in json.loads(file.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} does not hold rows of block sizes ({error}); delete it and tune again") from error


def write(file: Path, rows: Sequence[Row]) -> None:
    """Put rows into a file, over those it had for the same device, op, implementation, key and source."""
    kept = {_identity(row): row for row in (*read(file), *rows)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([asdict(row) for row in kept.values()], indent=1) + "\n")


def measure(case: Any, implementation: str, chosen: Sizes) -> float:
    """Microseconds that one call of a case's op with these sizes takes on the device."""
    with forced(chosen):
        timed = timing.measure(
            case, lambda inputs: case.run(inputs, implementation), lambda seed: case.make(seed, implementation), timing.Settings()
        )
    return timed.typical * 1e6


def tune(op: str, implementation: str, cases: Sequence[Any], measure: Measure = measure) -> Iterator[Row]:
    """The fastest candidate for each key that the cases have and the implementation takes, as soon as it is known; cases of one key are
    measured together."""
    target, module = dispatch.target(), _module(op, implementation)
    for key, same in by_key(cases):
        refused = dispatch.refusal(op, implementation, target, key)
        if refused is not None:
            _say(f"{op} {key}: left out, {refused}")
            continue
        timed = []
        for candidate in module.candidates(target.platform, key):
            timed.append((sum(measure(case, implementation, candidate) for case in same), candidate))
            _say(f"{op} {key} {candidate}: {timed[-1][0]:.1f} us")
        microseconds, best = min(timed, key=lambda pair: pair[0])
        yield Row(op, implementation, key, best, target.device, jax.__version__, today(), round(microseconds, 1))


def by_key(cases: Sequence[Any]) -> list[tuple[Key, list[Any]]]:
    """The cases' keys, and the cases of each."""
    grouped: dict[str, list[Any]] = {}
    for case in cases:
        grouped.setdefault(json.dumps(case.tuning_key(), sort_keys=True), []).append(case)
    return [(json.loads(text), same) for text, same in grouped.items()]


def today() -> str:
    """The date of a row."""
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with a message for an op, implementation or case that does not exist or has nothing to tune."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tuning", description="Measure block sizes on this machine's device.")
    parser.add_argument("--op", required=True, choices=dispatch.ops())
    parser.add_argument("--implementation", default="auto", help="default: what 'auto' picks here")
    parser.add_argument("--case", action="append", help="only the named case, of those to tune or of the benchmark's (may be repeated)")
    parser.add_argument("--for", dest="generations", type=_generations, help="model TPUs that are not there, of generations such as v5e,7x")
    parser.add_argument("--out", type=Path, help=f"file to write, with --for a folder; default: in {user_folder()}")
    options = parser.parse_args(arguments)
    try:
        cases = _named(options.op, options.case, options.out)
        if options.generations:
            _model(options, cases)
            return
        target = dispatch.target()
        implementation = dispatch.choose(options.op, options.implementation, target)
    except (ValueError, NotImplementedError) as error:
        parser.error(str(error))
    if not hasattr(_module(options.op, implementation), "candidates"):
        parser.error(f"the {implementation!r} implementation of {options.op} has no block sizes to tune")
    out = options.out or table_file(user_folder(), target.device, options.op)
    for row in tune(options.op, implementation, cases):
        write(out, [row])  # what is measured is kept, whatever comes
        _say(f"wrote a row of {out}")


def _model(options: argparse.Namespace, cases: Sequence[Any]) -> None:
    """Rows for TPUs that are not there, one after the other into their files."""
    if options.implementation not in ("auto", "tpu"):
        raise ValueError(f"--for models the 'tpu' implementation, not {options.implementation!r}")
    dispatch.choose(options.op, "tpu", dispatch.Target("tpu", options.generations[0].kind))
    for row in importlib.import_module("pallas_kernels.modelling").rows(options.op, cases, options.generations):
        write(table_file(options.out or user_folder(), row.device, options.op), [row])
        _say(f"{row.device} {row.key}: {row.sizes}, {row.microseconds} us predicted, not measured")


def _generations(text: str) -> list[generations.Generation]:
    names = text.split(",")
    unknown = sorted(set(names) - set(generations.BY_NAME))
    if unknown:
        raise argparse.ArgumentTypeError(f"no generation {', '.join(unknown)}; there are {', '.join(generations.BY_NAME)}")
    return [generations.BY_NAME[name] for name in names]


def _named(op: str, names: Sequence[str] | None, out: Path | None) -> list[Any]:
    cases = _module(op, "cases")
    known = {case.name: case for case in (*cases.TUNING, *getattr(cases, "BENCH", ()))}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ValueError(f"{op} has no tuning case {', '.join(unknown)}; there are {', '.join(known)}")
    found = [known[name] for name in names] if names else list(cases.TUNING)
    if out is None and any(case not in cases.TUNING for case in found):
        raise ValueError("rows of the benchmark's cases would stand for all steps of their keys: say with --out where they are to go")
    return found


def _identity(row: Row) -> str:
    return json.dumps([row.op, row.implementation, row.device, sorted(row.key.items()), row.source])


def _module(op: str, name: str) -> Any:
    return importlib.import_module(f"pallas_kernels.{op}.{name}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":  # what runs is another copy of this module than the one that ops ask for sizes
    importlib.import_module("pallas_kernels.tuning").main()
