"""R13, broken checkpoints give clear errors: folders of every format that is read, each damaged in one way, and started from.

Cases are drawn by the seed: a kind of folder (unquantised in several files, compressed-tensors of four schemes with and without a manifest,
Orbax, AWQ, GPTQ, fp8 in tiles) and a damage that fits it (damage.py). A good end is one error of ours, on one line, that names the file and
what the case asks for. A start that succeeds is a fault, unless everything that was read is equal to the undamaged folder's (a flipped bit
in a blank). The long run happens in a process of its own, so that a signal is noticed and counted, and starts the command line itself on
every twentieth case: exit code 2, one line on stderr.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxinfer.console import remark
from jaxinfer.selftest import damage, foreign
from jaxinfer.selftest.stand import Verdict

PROMISE = "broken checkpoints end in one message that names file, expected and found; none loads in silence, none kills the process"
ENGINE = False
CASES = {"long": 150, "quick": 30}
SCHEMES = {"int8": "int8", "int4": "int4", "w8a8": "w8a8", "fp8-rows": "fp8"}
BY_COMMAND = 20
KEPT = 5


class Result(NamedTuple):
    """How one case ended: "good", "harmless", "silent", "unclear", "broke" or "signal", and what was said."""

    case: str
    kind: str
    end: str
    message: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this row."""
    parser.add_argument("--model", default="demo", help="an unquantised model that is damaged [demo]")
    parser.add_argument("--cases", type=int, help="damaged folders [150; 30 with --quick]")
    parser.add_argument("--worker", type=int, metavar="FIRST", help="run the cases from this one on, one JSON line each, and end")


def run(args: argparse.Namespace) -> Verdict:
    """Damage and start."""
    cases = args.cases or CASES["quick" if args.quick else "long"]
    if args.worker is not None:
        for result in check(args.model, args.worker, cases, args.seed):
            print(json.dumps(result), flush=True)  # noqa: T201  read by the process that started this one
        return Verdict({}, True)
    results = list(check(args.model, 0, cases, args.seed)) if args.quick else supervise(args, cases)
    return verdict(results)


def verdict(results: list[Result]) -> Verdict:
    """Count how cases ended; the promise holds if all were good or harmless."""
    ends = Counter(result.end for result in results)
    faults = [result._asdict() for result in results if result.end not in ("good", "harmless")]
    counts = {"cases": len(results), "kinds": len({(it.case, it.kind) for it in results}), **ends, "first_faults": faults[:KEPT]}
    return Verdict({name: value for name, value in counts.items() if value != []}, bool(results) and not faults)


def check(model: str, first: int, cases: int, seed: int) -> Iterator[Result]:
    """Run the cases from `first` on in this process."""
    from jaxinfer.checkpoint import hub

    with tempfile.TemporaryDirectory() as folder:
        source, whole = hub.resolve(model), dict[str, str]()
        order = ordered(seed)
        for number in range(first, cases):
            draw = random.Random(f"{seed} {number}")
            case = order[number % len(order)]
            kind = draw.choice(case.kinds)
            base, broken = Path(folder) / kind, Path(folder) / "broken"
            if kind not in whole:
                build(source, base)
                whole[kind] = state(base)
            shutil.copytree(base, broken)
            changed = case.damage(broken, draw)
            yield judge(case, kind, broken, changed, whole[kind])
            if number % BY_COMMAND == BY_COMMAND - 1 and cases >= CASES["long"]:
                yield by_command(case, kind, broken)
            shutil.rmtree(broken)


def ordered(seed: int) -> list[damage.Case]:
    """Every damage once, in an order that the seed draws."""
    return random.Random(seed).sample(damage.CASES, len(damage.CASES))


def build(source: Path, base: Path) -> None:
    """A whole folder of the kind (a word of damage.py) that its name is."""
    from jaxinfer.checkpoint.convert import convert
    from jaxinfer.models.graph import Quantization

    scheme = SCHEMES.get(base.name.removesuffix("+"))
    if base.name in foreign.CONFIGS:
        foreign.write(source, base, base.name)
    elif scheme is not None:
        convert(source, base, Quantization.parse(scheme))
        if not base.name.endswith("+"):
            (base / damage.MANIFEST).unlink()
    elif base.name == "orbax":
        convert(source, base, Quantization.parse("int8"), kind="orbax")
    else:
        shutil.copytree(source, base)
        split(base)


def split(folder: Path) -> None:
    """Cut a folder's one file of weights in several, with an index, if it has but one."""
    from jaxinfer.checkpoint import write
    from jaxinfer.checkpoint.formats.folder import WeightFiles

    if (folder / "model.safetensors.index.json").exists():
        return

    with WeightFiles(folder) as files:
        arrays = {name: it.read(tuple(slice(0, size) for size in it.shape)) for name, it in files.tensors.items()}
    (folder / "model.safetensors").unlink()
    planned = [write.Planned(name, it.dtype, it.shape, lambda it=it: iter([it])) for name, it in arrays.items()]
    write.write_files(folder, planned, limit=sum(it.nbytes for it in arrays.values()) // 3)


def state(folder: Path) -> str:
    """A digest of all that a start reads: weights on the device, settings, tokenizer.

    Raises:
        CheckpointError, ConfigError, TokenizerError: as a start would.
    """
    import jax
    import numpy as np

    from jaxinfer.checkpoint import read
    from jaxinfer.config import EngineConfig, ModelConfig
    from jaxinfer.engine import setup
    from jaxinfer.sharding import make_mesh
    from jaxinfer.tokenizer import Tokenizer

    model = setup._describe(EngineConfig(ModelConfig(str(folder), dtype="bfloat16")))
    Tokenizer.load(folder)
    found = hashlib.sha256(f"{model.graph.config} {model.graph.specs} {setup._sampling_defaults(folder)}".encode())
    read.verify(folder, model.graph)
    weights = read.load(folder, model.graph, make_mesh({}, jax.devices()[:1]))
    for leaf in model.graph.leaves(weights):
        found.update(np.asarray(leaf).tobytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).exists():
            found.update(json.dumps(read.read_json(folder / name)).encode())
    return found.hexdigest()


def judge(case: damage.Case, kind: str, folder: Path, changed: str, whole: str) -> Result:
    """Start from a damaged folder, and what to think of how that ended."""
    try:
        same = state(folder) == whole
    except Exception as error:
        message, ours = str(error), type(error).__module__.startswith("jaxinfer.")
        if not ours:
            return Result(case.name, kind, "broke", f"{type(error).__name__}: {message}")
        return Result(case.name, kind, "good" if clear(message, case, folder, changed) else "unclear", message)
    return Result(case.name, kind, "harmless" if same else "silent", f"changed {changed}")


def clear(message: str, case: damage.Case, folder: Path, changed: str) -> bool:
    """Whether a message stands alone: one line, naming a file in the folder and what the case asks for."""
    named = str(folder) in message or ".json" in message or (bool(changed) and changed in message)
    return "\n" not in message and named and case.needs in message and 20 < len(message) < 1200


def by_command(case: damage.Case, kind: str, folder: Path) -> Result:
    """The same by the command line, which must end with code 2 and one line."""
    command = [sys.executable, "-m", "jaxinfer", "generate", "--model", str(folder), "--prompt", "x", "--max-tokens", "1"]
    small = ["--max-sequences", "1", "--max-step-tokens", "16", "--compilation-cache", "off", "--max-model-len", "64"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, check=False)  # noqa: S603  the flags are our own
    errors = [line for line in done.stderr.splitlines() if line.startswith("jaxinfer: error: ")]
    good = done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr
    harmless = done.returncode == 0
    return Result(case.name, f"{kind}, by the command line", "good" if good else "harmless" if harmless else "unclear", done.stderr[-600:])


def supervise(args: argparse.Namespace, cases: int) -> list[Result]:
    """Run the cases in another process, and go on with the next one in a new process where one dies."""
    results: list[Result] = []
    numbered = 0
    while numbered < cases:
        flags = ["--worker", str(numbered), "--cases", str(cases), "--seed", str(args.seed), "--model", args.model]
        command = [sys.executable, "-m", "jaxinfer", "selftest", "R13", *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  the flags are our own
            if process.stdout is None:
                raise RuntimeError("the worker has no output")
            for line in process.stdout:
                found: Mapping[str, Any] | list[Any] = json.loads(line)
                if isinstance(found, list):
                    results.append(Result(*found))
                    numbered += "by the command line" not in results[-1].kind
                    remark(f"{numbered} of {cases} cases")
        if process.returncode != 0:
            if numbered == 0 and not results:
                raise RuntimeError(f"the worker ended with {process.returncode} before its first case")
            case = ordered(args.seed)[numbered % len(damage.CASES)]
            results.append(Result(case.name, "?", "signal", f"the process ended with {process.returncode}"))
            numbered += 1
    return results
