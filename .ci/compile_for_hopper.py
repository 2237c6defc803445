"""Compile the GPU implementations of the ops for an H200 described by text, on a machine without a GPU.

Needs jax 0.11 or newer with the CUDA plugin of its own version (no driver, none of the other CUDA packages), numpy and jaxtyping:

    pip install "jax==0.11.2" jaxtyping && pip install --no-deps "jax-cuda13-plugin==0.11.2" "jax-cuda13-pjrt==0.11.2"
    python .ci/compile_for_hopper.py

Each case is a program: paged attention with decode rows, prefill rows or both, flash attention, a matmul of few tokens, a chain of them or
of matmuls of int8 numbers, or a norm. A case that does not compile ends the run. What this does not show is that the numbers are right: the
tests do that in jax's interpreter, and a card does.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import hopper, hopper_few_plan, hopper_tens_plan, tuning
from pallas_kernels.counters import counted
from pallas_kernels.dense_matmul.cases import Case as MatmulCase
from pallas_kernels.flash_attention import cases as flash_cases
from pallas_kernels.flash_attention import gpu as flash_gpu
from pallas_kernels.paged_attention import gpu
from pallas_kernels.paged_attention.cases import BOTH, ROPE, SINKS, Case
from pallas_kernels.paged_attention.pool import LARGEST
from pallas_kernels.quantized_matmul import gpu as quantized_gpu
from pallas_kernels.quantized_matmul.cases import Case as QuantizedCase
from pallas_kernels.residual_norm import gpu as norm_gpu
from pallas_kernels.residual_norm.cases import Case as NormCase
from pallas_kernels.token_chain import cases as chain_cases
from pallas_kernels.token_chain import gpu as chain_gpu

H200 = (Path(__file__).parents[1] / "jaxinfer" / "planner" / "targets" / "h200.txtpb").read_text()
MIXED = Case("mixed", 4, 2, 256, page_size=64, pages_per_row=32, group=4, head_dim=128, dtype="bfloat16")
FLASH = flash_cases.Case("flash", 2, 512, 512, kv_heads=2, group=4, head_dim=128, dtype="bfloat16")
RAGGED = chain_cases.Case("7b", 4096, 4096, chain_cases.layer(4096, 11008, 12288))  # 11,008 numbers come in pieces and a rest
GROUPS, PAGES = (1, 3, 4, 8, 16), (8, 16, 32, 64, 128, 256)


def cases() -> list[Case]:
    """Every head dimension with every group and page size, each with some of window, cap, sinks and dtype; then one part at a time."""
    found = []
    for number, head_dim in enumerate(hopper.HEAD_DIMS):
        pages = PAGES[number % 2 :: 2] if head_dim != 128 else PAGES
        for index in range(max(len(GROUPS), len(pages))):
            options = index + number
            changes = {
                "group": GROUPS[index % len(GROUPS)],
                "page_size": pages[index % len(pages)],
                "window": 200 if options % 2 else None,
                "soft_cap": 30.0 if options % 3 == 0 else None,
                "extras": (ROPE, BOTH, SINKS)[options % 3],
                "dtype": ("bfloat16", "float16")[options // 2 % 2],
            }
            words = "-".join(str(value) for value in changes.values() if not isinstance(value, frozenset))
            found.append(replace(MIXED, name=f"{head_dim}-{words}", head_dim=head_dim, **changes))
    found.append(replace(MIXED, name="decode alone", prefill_rows=0, prefill_tokens=0))
    found.append(replace(MIXED, name="many decode rows", decode_rows=512, prefill_rows=0, prefill_tokens=0, pages_per_row=4))
    found.append(replace(MIXED, name="prefill alone", decode_rows=0))
    return [*found, *drafts(), *codes(), *writes()]


def drafts() -> list[Case]:
    """Decode rows of several tokens, in one tile and in two."""
    alone = replace(MIXED, prefill_rows=0, prefill_tokens=0)
    shapes = ({"decode_tokens": 2}, {"decode_tokens": 8, "group": 16, "window": 200, "extras": SINKS}, {"decode_tokens": 5, "group": 3})
    found = [replace(alone, name=f"drafts {changes}", **changes) for changes in shapes]
    return [*found, replace(MIXED, name="drafts beside prefill", decode_tokens=4, head_dim=256, dtype="float16", page_size=16)]


def codes() -> list[Case]:
    """Quantised pools: each dtype with each head dimension that there is."""
    found = []
    for number, kv_dtype in enumerate(LARGEST):
        for index, head_dim in enumerate((64, 96, 128)):
            changes = {"page_size": PAGES[2 + index + number], "decode_tokens": (1, 3)[(index + number) % 2]}
            changes |= {"extras": (ROPE, BOTH)[number], "window": 200 if index == 1 else None}
            found.append(replace(MIXED, name=f"{kv_dtype} {head_dim}", head_dim=head_dim, kv_dtype=kv_dtype, **changes))
    return found


def writes() -> list[Case]:
    """Few tokens, whose heads are dealt out to blocks, and many, one block each."""
    few = replace(MIXED, kv_heads=8, prefill_rows=0, prefill_tokens=0)
    found = []
    for number, head_dim in enumerate(hopper.HEAD_DIMS):
        found.append(replace(few, name=f"few tokens {head_dim}", head_dim=head_dim, group=GROUPS[number % 2], dtype="float16"))
        found.append(replace(found[-1], name=f"many tokens {head_dim}", decode_rows=0, prefill_rows=1, prefill_tokens=2048))
    return [*found, *(replace(few, name=f"few tokens {kv_dtype}", head_dim=96, kv_dtype=kv_dtype) for kv_dtype in LARGEST)]


def matmuls() -> list[MatmulCase]:
    """An 8B model's weights and small ones, for every way to cut the tokens."""
    shapes = [(4096, 6144), (14336, 4096), (4096, 128256), (64, 64)]
    found = [MatmulCase("x", tokens, *shape) for shape in shapes for tokens in (2, 16, 17, 64, 65, 128)]
    return [*found, MatmulCase("x", 33, 448, 192, dtype="float16")]


def quantized() -> list[QuantizedCase]:
    """Every format with few and many tokens, an 8B model's weights and a small one; zeros, tiles and inputs rounded to int8; one token
    with int8 weights of all sizes."""
    formats = ({"weight": "int8"}, {"weight": "int4", "group": 128}, {"weight": "int4", "group": 64, "zeros": "given"}, {"weight": "fp8"})
    base = QuantizedCase("quantized", 16, 4096, 6144, dtype="bfloat16")
    found = [replace(base, tokens=tokens, **form) for form in formats for tokens in (1, 16, 64)]
    found += [replace(base, features=14336, outputs=4096, **form) for form in formats]
    found += [replace(base, features=128, outputs=64, weight="int4"), replace(base, activations="int8")]
    shapes = ((4096, 4096), (4096, 28672), (4096, 128256), (14336, 4096), (29568, 8192), (32768, 4096), (16256, 1032), (128, 8))
    found += [replace(base, tokens=1, features=features, outputs=outputs) for features, outputs in shapes]
    found += [replace(base, tokens=1, features=384, outputs=1032, dtype="float16", rows=8)]
    return [*found, replace(base, weight="fp8", group=128, rows=128, outputs=128256)]


def flash() -> list[flash_cases.Case]:
    """Every head dimension with long and short queries, lengths that are and are not whole, and each option somewhere."""
    ragged, packed, everything = flash_cases.RAGGED, flash_cases.PACKED, flash_cases.EVERYTHING
    shapes = (
        {"extras": ragged, "group": 1},
        {"queries": 133, "keys": 201, "extras": everything, "window": 100, "group": 3},
        {"extras": packed, "soft_cap": 30.0, "dtype": "float16"},
        {"queries": 20, "keys": 777, "extras": everything | packed, "window": 200, "group": 16},
        {"queries": 1, "keys": 9, "batch": 1, "causal": "full", "extras": ragged | packed, "group": 8},
        {"causal": "full", "dtype": "float16"},
    )
    return [
        replace(FLASH, name=f"flash {head_dim} {number}", head_dim=head_dim, **changes)
        for head_dim in hopper.HEAD_DIMS
        for number, changes in enumerate(shapes)
    ]


def kernels_of(case: Any, sizes: dict[str, int]) -> int:
    """How many kernels of ours the program has: decode and merge (many short rows are never split), prefill; flash. Where a kernel writes,
    that one and the one that lays the prefill's outputs back."""
    if isinstance(case, flash_cases.Case):
        return 1
    merged = "sinks" in case.extras or case.decode_rows < 100
    written = case.decode_rows * case.decode_tokens + case.prefill_tokens >= sizes["write_from"]
    merged = merged and ("sinks" in case.extras or not sizes["decode_merges"])  # else by the kernel that attends
    return written + (1 + merged) * (case.decode_rows > 0) + (1 + written) * (case.prefill_rows > 0)


def norms() -> list[NormCase]:
    """One token and several, with and without what is added, and features that are loaded 8, 2 and 1 at a time."""
    shapes = ({}, {"tokens": 8, "added": "nothing", "offset": 1.0}, {"features": 5376}, {"features": 384, "dtype": "float16"})
    return [replace(NormCase("norm", 1, 4096), **changes) for changes in (*shapes, {"features": 8192, "offset": 1.0})]


class Planned(NamedTuple):
    """A program: a case, its sizes (none: those that are looked up), and how many kernels of ours it has."""

    name: str
    case: Any
    sizes: dict[str, int] | None
    kernels: int


def attention() -> Iterator[Planned]:
    """All cases with the sizes of the heuristic, then one case per head dimension, and one of codes, with every candidate."""
    for module, found, base in ((gpu, cases(), MIXED), (flash_gpu, flash(), FLASH)):
        for case in found:
            sizes = module.heuristic("gpu", case.tuning_key())
            yield Planned(case.name, case, sizes, kernels_of(case, sizes))
        for head_dim in hopper.HEAD_DIMS:
            yield from candidates(module, replace(base, name=f"{base.name}, candidates {head_dim}", head_dim=head_dim))
    yield from candidates(gpu, replace(MIXED, name="candidates int8", kv_dtype="int8"))


def candidates(module: Any, case: Any) -> Iterator[Planned]:
    """The case with the first sizes; then, for each candidate, the kernels whose sizes are others, without those compiled already."""
    first, *others = module.candidates("gpu", case.tuning_key())
    yield Planned(case.name, case, first, kernels_of(case, first))
    for sizes in others:
        changed = {name for name in sizes if sizes[name] != first[name]}
        if changed == {"decode_longest_many"} or (changed == {"write_from"} and kernels_of(case, sizes) == kernels_of(case, first)):
            continue  # the same program: rows are not many, and the same one writes
        part = case
        if module is gpu and all(name.startswith("decode") for name in changed):
            part = replace(case, prefill_rows=0, prefill_tokens=0)
        elif module is gpu and all(name.startswith("prefill") for name in changed):
            part = replace(case, decode_rows=0)
        yield Planned(case.name, part, sizes, kernels_of(part, sizes))


def products() -> Iterator[Planned]:
    """Matmuls with the sizes that are looked up; quantised ones with the first sizes, one shape of each format with all; norms."""
    for case in matmuls():
        yield Planned(f"matmul {case.tokens} x {case.features} x {case.outputs}", case, None, 1)
    for case in quantized():
        every = quantized_gpu.candidates("gpu", case.tuning_key())[:-1]
        for sizes in every if case.tokens == 16 and case.outputs == 6144 else every[: 2 if case.tokens == 1 else 1]:
            kernels = 2 if sizes["splits"] else 1  # one cuts the tokens
            yield Planned(f"{case.name} {case.weight} {case.tokens} x {case.features} x {case.outputs}", case, sizes, kernels)
    for case in norms():
        yield Planned(f"{case.name} {case.tokens} x {case.features}", case, norm_gpu.candidates("gpu", case.tuning_key())[0], 1)
    for case in (*chain_cases.TUNING, *chain_cases.CASES, RAGGED):
        for sizes in chain_gpu.candidates("gpu", case.tuning_key()) if case.tokens and not uneven(case) else ():
            yield Planned(f"chain {case.name}", case, sizes, len(case.parts) if case.activations == "int8" else 1)


def uneven(case: chain_cases.Case) -> bool:
    """Whether a small chain of some tens of tokens does not fall to so many multiprocessors (the interpreter has fewer)."""
    tens = case.activations == "float" and case.tokens > hopper_few_plan.MOST
    return tens and hopper_tens_plan.refusal(case.tuning_key()) is not None


def kernels_in(case: Any, mesh: Mesh) -> int:
    """Compile a case and count its kernels of ours."""
    if isinstance(case, MatmulCase):
        shapes = {"x": (case.tokens, case.features), "weight": (case.outputs, case.features)}
        given = {name: jax.ShapeDtypeStruct(shape, case.dtype) for name, shape in shapes.items()}
    elif isinstance(case, QuantizedCase):
        given = jax.eval_shape(lambda: case.make(0))  # weights of a gigabyte
    elif isinstance(case, chain_cases.Case):
        given = case.described()
    else:
        given = case.make(0)  # partly NumPy: no trace
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())), given)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(lambda inputs: case.run(counted(case, inputs), "gpu")).lower(given).compile().as_text()
    return text.count('custom_call_target="mosaic_gpu')


def main() -> None:
    """Compile all programs, or every second one, third one, ..."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="1/1", help="as in 1/2 and 2/2: the first and the second of two processes")
    part, parts = map(int, parser.parse_args().part.split("/"))
    topology = topologies.get_topology_desc("", platform="cuda", target_config=H200, topology="1x1x1")
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    mine = list((*attention(), *products()))[part - 1 :: parts]
    for name, case, sizes, wanted in mine:
        begin = time.perf_counter()
        with tuning.forced(sizes) if sizes else nullcontext():
            found = kernels_in(case, mesh)
        print(f"{name} {tuple((sizes or {}).values())}: {found} kernels, {time.perf_counter() - begin:.1f} s", flush=True)
        if found != wanted:
            raise SystemExit(f"{case}: {found} kernels of ours in the program, there should be {wanted}")
    print(f"{len(mine)} programs compiled for {topology.devices[0].device_kind} with jax {jax.__version__}")


if __name__ == "__main__":
    main()
