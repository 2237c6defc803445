"""Run an op's kernels on the GPU that is here, against the reference in float32, many times over: do they always say the same?

    python .ci/check_on_gpu.py --op token_chain [--repeat 200] [--case NAME] [--out FILE.jsonl]

Every case of the op's cases.py that the implementation does not refuse, with every candidate of the tuner; an op with a pool has a check
of its own (`pallas_kernels.paged_attention.draws`). A line for each: the relative error, how many of the repetitions gave other bits than
the first, and seconds. Ends with an error if there are any, or if an error is larger than the tests allow. What waits for itself shows as
a program that never ends: run it under `timeout`.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, tuning
from pallas_kernels.counters import counted

TOLERANCE = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}  # as the tests have it


def wider(value: Any) -> Any:
    """Floating arrays of 16 bits in float32, others as they are."""
    value = jnp.asarray(value)
    return value.astype(jnp.float32) if value.dtype in (jnp.bfloat16, jnp.float16) else value


def error(found: jax.Array, wanted: jax.Array) -> float:
    """Relative, Frobenius; infinite where one is NaN and the other is not."""
    mine, its = (np.asarray(values, np.float64) for values in (found, wanted))
    if not np.array_equal(np.isnan(mine), np.isnan(its)):
        return float("inf")
    return float(np.sqrt(np.nansum((mine - its) ** 2) / max(np.nansum(its**2), 1e-30)))


def checked(op: str, case: Any, sizes: dict[str, int], repeat: int) -> dict[str, Any]:
    """One case with one choice of sizes."""
    inputs, begin = case.make(0), time.perf_counter()
    with tuning.forced(sizes):
        run = jax.jit(lambda given: case.run(counted(case, given), "gpu"))
        first = jax.block_until_ready(run(inputs))
    same = jax.jit(
        lambda one, other: jnp.stack(
            [jnp.all((a == b) | ((a != a) & (b != b))) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)]
        )
    )
    differ = sum(not bool(jnp.all(same(first, run(inputs)))) for _ in range(repeat))
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(lambda given: case.run(given, "reference"))(jax.tree.map(wider, inputs))
    errors = [error(mine, its) for mine, its in zip(jax.tree.leaves(first), jax.tree.leaves(wanted), strict=True)]
    return {
        "op": op, "case": case.name, "sizes": sizes, "error": max(errors), "allowed": TOLERANCE[case.dtype] + getattr(case, "slack", 0),
        "differ": differ, "of": repeat, "seconds": round(time.perf_counter() - begin, 2),
    }  # fmt: skip


def checkable(op: str) -> bool:
    """Whether an op has kernels for GPUs, and no pool that lies differently for each implementation."""
    return "gpu" in dispatch.implementations(op) and not importlib.import_module(f"pallas_kernels.{op}.cases").Case.donates


def planned(op: str, name: str | None) -> Iterator[tuple[Any, dict[str, int]]]:
    """Cases that are not refused, with each candidate."""
    cases, gpu = (importlib.import_module(f"pallas_kernels.{op}.{part}") for part in ("cases", "gpu"))
    for case in (*cases.CASES, *cases.TUNING):
        key = case.tuning_key()
        if name in (None, case.name) and gpu.refusal(dispatch.target(), key) is None:
            yield from ((case, sizes) for sizes in gpu.candidates("gpu", key))


def main() -> None:
    """Check and print; ends with what is wrong, if anything is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--op", required=True, choices=[op for op in dispatch.ops() if checkable(op)])
    parser.add_argument("--case")
    parser.add_argument("--repeat", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    wrong = 0
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    for case, sizes in planned(options.op, options.case):
        row = checked(options.op, case, sizes, options.repeat)
        wrong += row["differ"] > 0 or row["error"] > row["allowed"]
        print(json.dumps(row), flush=True)
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    if wrong:
        raise SystemExit(f"{wrong} are wrong or not always the same")


if __name__ == "__main__":
    main()
