"""Random steps of paged attention, drawn and checked on the device that runs them: `python -m pallas_kernels.paged_attention.draws`.

For each compiled shape many steps are drawn: empty rows, rows of one key, page edges, full rows, shuffled tables, NaN wherever no row has
data. Each is held against the reference in float64 on the numbers that the implementation wrote to the pool; what it wrote is held against
the rotated keys and values; the rest of the pool must be as it was; and one row, alone in the step, must come out bit for bit as it did
among the others. Prints the worst errors of each shape and ends with 1 if one is too large.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import attention, dispatch, tuning
from pallas_kernels.counters import counted
from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.api import PagedMetadata
from pallas_kernels.paged_attention.cases import BOTH, NOTHING, SINKS, Case
from pallas_kernels.paged_attention.pool import LARGEST, Pool, QuantizedKV, dequantize

OUT = {"bfloat16": 8e-3, "float16": 1e-3, "float32": 3e-6}  # relative error of a step's outputs; four times as much of one vector
EPSILON = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-22}  # of one number that was rotated and stored
HALF_STEP = {None: 0.0, "int8": 0.5 / 127, "float8_e4m3fn": 2**-4}  # of a code, relative to the vector's largest number


class Step(NamedTuple):
    """A step as it was drawn, what came of it, and of a row of it alone."""

    inputs: dict[str, Any]
    out: Array
    kv: Pool
    alone: Array
    mine: Array


class Errors(NamedTuple):
    """Of outputs: relative, of a step and of its worst vector; of written keys and values, in units of what rounding explains; and how
    many numbers are NaN, not 0 for padding, changed elsewhere in the pool, or not bit for bit what the row gives alone."""

    step: Array
    vector: Array
    written: Array
    wrong: Array


def shapes() -> list[Case]:
    """What is compiled: decode with 1 to 8 tokens, prefill, both, in each kind of pool, with each option somewhere."""
    base = Case("base", page_size=64, pages_per_row=8, kv_heads=2, group=4, head_dim=128, dtype="bfloat16")
    found = []
    for kv_dtype in (None, *LARGEST):
        kind, small = replace(base, kv_dtype=kv_dtype), 32 if kv_dtype else 16
        found += [
            replace(kind, name="decode", decode_rows=9),
            replace(kind, name="decode long", decode_rows=2, pages_per_row=60, extras=SINKS),
            replace(kind, name="decode many", decode_rows=200, pages_per_row=3, head_dim=64, extras=NOTHING),
            replace(kind, name="tokens 2", decode_rows=7, decode_tokens=2, page_size=small, pages_per_row=12, head_dim=64, extras=BOTH),
            replace(kind, name="tokens 4", decode_rows=6, decode_tokens=4, group=3, page_size=128, pages_per_row=5, window=70),
            replace(kind, name="tokens 8", decode_rows=5, decode_tokens=8, group=8, soft_cap=20.0),
            replace(kind, name="tokens 8 group 16", decode_rows=5, decode_tokens=8, group=16, kv_heads=1, extras=SINKS),
            replace(kind, name="prefill", prefill_rows=4, prefill_tokens=700, extras=BOTH),
            replace(kind, name="prefill window", prefill_rows=3, prefill_tokens=500, page_size=small, pages_per_row=16, window=70),
            replace(kind, name="mixed", decode_rows=5, prefill_rows=3, prefill_tokens=300, group=5, head_dim=96, soft_cap=20.0),
        ]
    dealt = replace(base, name="decode dealt", decode_rows=9, kv_heads=5, group=3, head_dim=96)  # some heads are in two blocks (gpu_spread)
    found += [replace(dealt, kv_dtype=kv_dtype) for kv_dtype in (None, *LARGEST)]
    found += [
        replace(base, name="decode wide", decode_rows=9, head_dim=256, group=3),
        replace(base, name="prefill many", prefill_rows=4, prefill_tokens=700, kv_heads=8, group=1),  # too many for gpu_spread
    ]
    float16 = [replace(case, dtype="float16") for case in found if case.kv_dtype is None and case.name in ("decode", "tokens 4", "prefill")]
    return [*found, *float16]


def draw(case: Case, seed: Array) -> dict[str, Any]:
    """One step, made on the device, in the layout that all implementations with pages by head share."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))
    rows, page, width, per = case.decode_rows + case.prefill_rows, case.page_size, case.pages_per_row, case.decode_tokens
    queries = _queries(case, next(keys), next(keys))
    lengths = _lengths(case, queries, next(keys), next(keys))
    size = case.decode_rows * per
    behind = size + jnp.cumsum(queries[case.decode_rows :])
    starts = jnp.concatenate([jnp.arange(case.decode_rows) * per, jnp.array([size]), behind[:-1]])[:rows].astype(jnp.int32)
    token = jnp.arange(size + case.prefill_tokens, dtype=jnp.int32)[:, None]
    owns = (token >= starts) & (token < starts + queries)
    positions = jnp.max(jnp.where(owns, token - starts + lengths - queries, -1), axis=1)
    slots = jnp.arange(width * page, dtype=jnp.int32).reshape(1, width, page)
    tables = 1 + jax.random.permutation(next(keys), rows * width).reshape(rows, width).astype(jnp.int32)
    used = jnp.zeros((rows * width + 1, page), bool).at[tables].set(slots < lengths[:, None, None])
    tables = jnp.where(slots[:, :, 0] < lengths[:, None], tables, 0)
    inputs: dict[str, Any] = {"positions": positions, "kv": _pool(case, used, next(keys), next(keys))}
    for name, heads in (("q", case.kv_heads * case.group), ("k", case.kv_heads), ("v", case.kv_heads)):
        drawn = jax.random.normal(next(keys), (token.shape[0], heads, case.head_dim))
        inputs[name] = jnp.where(positions[:, None, None] >= 0, drawn, jnp.nan).astype(case.dtype)
    if "sinks" in case.extras:
        inputs["sinks"] = jax.random.normal(next(keys), (case.kv_heads * case.group,), case.dtype)
    if "rope" in case.extras:
        inputs["rope"] = 10000.0 ** -jnp.linspace(0, 1, case.head_dim // 2, dtype=jnp.float32)
    return inputs | {"metadata": PagedMetadata(tables, starts, queries, lengths, case.decode_rows, per)}


def _queries(case: Case, decode: Array, prefill: Array) -> Array:
    """Tokens of each row: a fifth of the decode rows is empty, prefill rows have few, a page or any number, as far as there is room."""
    found = jax.random.randint(decode, (case.decode_rows,), 1, case.decode_tokens + 1)
    found = list(jnp.where(jax.random.uniform(decode, found.shape) < 0.2, 0, found))
    left = jnp.int32(case.prefill_tokens)
    for key in jax.random.split(prefill, max(case.prefill_rows, 1))[: case.prefill_rows]:
        wanted = jnp.array([0, 1, 2, case.page_size, case.page_size + 1, case.prefill_tokens, case.prefill_tokens // 3])
        wanted = wanted.at[1].set(jax.random.randint(key, (), 1, case.prefill_tokens))
        mine = jnp.minimum(jax.random.choice(key, wanted), jnp.minimum(left, case.page_size * case.pages_per_row))
        found.append(mine)
        left = left - mine
    return jnp.stack(found).astype(jnp.int32)


def _lengths(case: Case, queries: Array, which: Array, key: Array) -> Array:
    """Keys of each row: just its own tokens, whole pages, one more or less, everything, or any number."""
    capacity, rows = case.page_size * case.pages_per_row, queries.shape[0]
    whole = case.page_size * jax.random.randint(key, (rows,), 1, case.pages_per_row + 1)
    some = jax.random.randint(key, (rows,), 1, capacity + 1)
    options = jnp.stack([queries, whole - 1, whole, whole + 1, jnp.full_like(queries, capacity), some, queries + 1])
    wanted = jnp.take_along_axis(options, jax.random.randint(which, (1, rows), 0, options.shape[0]), axis=0)[0]
    return jnp.where(queries > 0, jnp.clip(wanted, queries, capacity), 0).astype(jnp.int32)


def _pool(case: Case, used: Array, key: Array, other: Array) -> Pool:
    """Numbers where a row has tokens; NaN elsewhere, or any code with the scale NaN."""
    mask, shape = used[:, None, None], (used.shape[0], case.kv_heads, 2, case.page_size, case.head_dim)
    drawn = jax.random.normal(key, shape)
    if case.kv_dtype is None:
        return jnp.where(mask[..., None], drawn, jnp.nan).astype(case.dtype)
    largest = LARGEST[case.kv_dtype]
    garbage = jnp.round(drawn * 100) if case.kv_dtype == "int8" else jnp.full_like(drawn, jnp.nan)
    codes = jnp.where(mask[..., None], jnp.clip(jnp.round(drawn * largest / 3), -largest, largest), jnp.clip(garbage, -127, 127))
    scales = jnp.exp(jax.random.normal(other, shape[:-1]) / 2) * 3 / largest
    return QuantizedKV(codes.astype(case.kv_dtype), jnp.where(mask, scales, jnp.nan))


@contextmanager
def _promoting() -> Iterator[None]:
    """Inside, numbers of different dtypes and ranks go together, as NumPy has it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@_promoting()
def play(case: Case, implementation: str, seed: Array) -> Step:
    """Draw a step, run it, and run it again with one row alone."""
    inputs = draw(case, seed)
    metadata, run = inputs["metadata"], jax.jit(lambda inputs: case.run(counted(case, inputs), implementation))  # traced once
    result = run(inputs)
    rows = metadata.query_lengths.shape[0]
    mine = jnp.argmax(jnp.where(metadata.query_lengths > 0, (jnp.arange(rows) * 7 + seed) % rows + 1, 0))
    own = jnp.arange(rows) == mine
    token = jnp.arange(inputs["positions"].shape[0])
    start = metadata.query_starts[mine]
    of_mine = (token >= start) & (token < start + metadata.query_lengths[mine])
    leaves = (metadata.query_lengths, metadata.kv_lengths)
    queries, lengths = (jnp.where(own, leaf, 0) for leaf in leaves)
    others = replace(metadata, page_tables=jnp.where(own[:, None], metadata.page_tables, 0), query_lengths=queries, kv_lengths=lengths)
    alone = run(inputs | {"metadata": others, "positions": jnp.where(of_mine, inputs["positions"], -1)})
    return Step(inputs, result.out, result.kv, alone.out, of_mine)


@_promoting()
def judge(case: Case, step: Step) -> Errors:
    """The errors of a step, in float64 (to be traced with 64-bit types enabled)."""
    inputs, positions, metadata = step.inputs, step.inputs["positions"], step.inputs["metadata"]
    real, wide = positions >= 0, jnp.float64
    q, k = inputs["q"].astype(wide), inputs["k"].astype(wide)
    if "rope" in inputs:
        table = attention.rope_table(positions, inputs["rope"].astype(wide), case.spec.rope_scale)
        q, k = attention.rotate(q, table), attention.rotate(k, table)
    at = jnp.maximum(positions, 0)
    row = jnp.argmax((jnp.arange(len(positions))[:, None] >= metadata.query_starts) & (metadata.query_lengths > 0)
                     & (jnp.arange(len(positions))[:, None] < metadata.query_starts + metadata.query_lengths), axis=1)  # fmt: skip
    page = jnp.where(real, metadata.page_tables[row, at // case.page_size], 0)
    place = page, slice(None), slice(None), at % case.page_size
    pool = dequantize(QuantizedKV(step.kv.values, step.kv.scales.astype(wide)), wide) if isinstance(step.kv, QuantizedKV) else step.kv
    pool = pool.astype(wide)
    new, wanted = pool[place], jnp.stack([k, inputs["v"].astype(wide)], axis=2)
    largest = jnp.max(jnp.abs(wanted), axis=-1, keepdims=True)
    allowed = largest * (HALF_STEP[case.kv_dtype] + 2 * EPSILON[case.dtype])
    written = jnp.max(jnp.where(real[:, None, None, None], jnp.abs(new - wanted) / allowed, 0))
    static = {"spec": case.spec, "rope": None, "sinks": inputs["sinks"].astype(wide) if "sinks" in inputs else None}
    exact = reference.paged_attention(q, new[:, :, 0], new[:, :, 1], positions, pool, metadata, **static).out
    off = jnp.where(real[:, None, None], step.out.astype(wide) - exact, 0)
    exact = jnp.where(real[:, None, None], exact, 0)
    vector = jnp.max(jnp.linalg.norm(off, axis=-1) / jnp.maximum(jnp.linalg.norm(exact, axis=-1), 1e-3))
    return Errors(
        step=jnp.linalg.norm(off) / jnp.maximum(jnp.linalg.norm(exact), 1e-9),
        vector=vector,
        written=jnp.where(jnp.isnan(written), jnp.inf, written),
        wrong=_wrong(step, place),
    )


def _wrong(step: Step, place: tuple[Any, ...]) -> Array:
    """How many numbers are what they must not be."""
    real = step.inputs["positions"] >= 0
    nan = jnp.sum(jnp.isnan(step.out))
    padding = jnp.sum(jnp.where(real[:, None, None], 0, step.out) != 0)
    unlike = jnp.sum(jnp.where(step.mine[:, None, None], _bits(step.out) != _bits(step.alone), False))
    changed = [
        jnp.sum(_bits(before.at[place].set(0))[1:] != _bits(after.at[place].set(0))[1:])
        for before, after in zip(jax.tree.leaves(step.inputs["kv"]), jax.tree.leaves(step.kv), strict=True)
    ]
    return nan + padding + unlike + sum(changed)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])


class Checked(NamedTuple):
    """The worst errors of a shape's draws."""

    case: Case
    worst: Errors

    @property
    def good(self) -> bool:
        """Whether all are small enough."""
        step, vector, written, wrong = (float(x) for x in self.worst)
        return step <= OUT[self.case.dtype] and vector <= 4 * OUT[self.case.dtype] and written <= 1.0 and wrong == 0

    def __str__(self) -> str:
        step, vector, written, wrong = (float(x) for x in self.worst)
        name = f"{self.case.name}, {self.case.kv_dtype or self.case.dtype}"
        return f"{name:34}{step:10.2e}{vector:10.2e}{written:8.2f}{wrong:8.0f}  {'ok' if self.good else 'WRONG'}"


def check(case: Case, implementation: str, seeds: Array, changed: tuning.Sizes | None = None) -> Checked:
    """Play and judge a shape's steps, one program for each of the two; changed: block sizes other than the implementation's own."""
    # XLA may make a kernel part of the slice update around it, which moves what it writes (see gpu_write)
    options = {"xla_gpu_enable_dynamic_slice_fusion": False} if jax.default_backend() == "gpu" else None
    key, target = case.tuning_key(), dispatch.target()
    with tuning.forced(tuning.sizes("paged_attention", implementation, target, key) | changed) if changed else nullcontext():
        steps = jax.jit(lambda seeds: lax.map(partial(play, case, implementation), seeds), compiler_options=options)(seeds)
    with jax.enable_x64(True):
        errors = jax.jit(lambda steps: jax.tree.map(partial(jnp.max, axis=0), lax.map(partial(judge, case), steps)))(steps)
    return Checked(case, Errors(*(jax.device_get(x) for x in errors)))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.paged_attention.draws", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--implementation", default="gpu", help="which is checked [gpu]")
    parser.add_argument("--draws", type=int, default=62, help="steps of each shape [62]")
    parser.add_argument("--only", default="", help="shapes whose name or dtype contains this")
    parser.add_argument("--threads", type=int, default=8, help="shapes compiled at once [8]")
    parser.add_argument("--sizes", type=_sizes, metavar="NAME=N,...", help="block sizes other than the usual ones, write_from=99 for one")
    args = parser.parse_args(arguments)
    found = [case for case in shapes() if args.only in f"{case.name}, {case.kv_dtype or case.dtype}"]
    _say(f"{len(found)} shapes x {args.draws} draws of {args.implementation} on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    _say(f"{'':34}{'step':>10}{'vector':>10}{'written':>8}{'wrong':>8}")
    bad = 0
    with ThreadPoolExecutor(args.threads) as pool:
        drawn = [jnp.arange(args.draws) + 1000 * number for number in range(len(found))]
        jobs = [pool.submit(check, case, args.implementation, seeds, args.sizes) for case, seeds in zip(found, drawn, strict=True)]
        for case, job in zip(found, jobs, strict=True):
            try:
                checked = job.result()
            except Exception as error:  # the others are checked all the same
                _say(f"{case.name}, {case.kv_dtype or case.dtype}: {type(error).__name__}: {str(error)[:300]}")
                bad += 1
                continue
            bad += not checked.good
            _say(str(checked))
    _say(f"{len(found) * args.draws} draws, {bad} of {len(found)} shapes wrong")
    return int(bad > 0)


def _sizes(text: str) -> tuning.Sizes:
    """Raises ValueError for anything but numbers by name."""
    return {name: int(number) for name, _, number in (part.partition("=") for part in text.split(","))}


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
