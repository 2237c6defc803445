"""Compile the TPU implementations of the ops with the real TPU compiler, for slices described by name, on a machine without a TPU.

    pip install "jax[tpu]" jaxtyping
    python .ci/compile_for_tpu.py [--all] [--generation v5e]

Each program must hold as many kernels of ours as the case has parts, hold the pool once (updated in place) and fit into VMEM with two of
every buffer, within the kernel's limit (the compiler checks) and the limit within the generation's. The rows of block sizes that ship are
all compiled for their generation. Without --all every generation compiles some programs of each op besides, so that every head size, page
size, dtype and option occurs somewhere; with it every case meets every generation. What this does not show is that the numbers are right:
the tests do that in jax's simulator. Nothing here was run on a chip.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from jax.sharding import Mesh

from pallas_kernels import dispatch, modelling, tensorcore, tuning
from pallas_kernels.flash_attention import cases as flash_cases
from pallas_kernels.generations import BY_NAME, Generation
from pallas_kernels.grouped_matmul import cases as grouped_cases
from pallas_kernels.grouped_matmul.cases import Case as GroupedCase
from pallas_kernels.paged_attention import cases as attention_cases
from pallas_kernels.paged_attention.cases import BOTH, ROPE, SINKS, Case
from pallas_kernels.quantized_matmul import cases as matmul_cases
from pallas_kernels.quantized_matmul.cases import Case as MatmulCase

MIXED = Case("mixed", 4, 2, 256, page_size=64, pages_per_row=32, kv_heads=8, group=4, head_dim=128, dtype="bfloat16")
FLASH = flash_cases.Case("flash", 2, 512, 512, kv_heads=2, group=4, head_dim=128, dtype="bfloat16")


def attention() -> list[Case]:
    """Every head size with each kind of pool, and each page size, group and option somewhere."""
    found = [MIXED, replace(MIXED, name="decode of one head", kv_heads=1, group=8, prefill_rows=0, prefill_tokens=0)]
    pages, groups = (16, 32, 64, 128, 256), (1, 2, 3, 4, 5, 8, 16)
    number = 0
    for kv_dtype in (None, "int8", "float8_e4m3fn"):
        for head_dim in (64, 96, 128, 256):
            changes = {
                "kv_dtype": kv_dtype,
                "page_size": pages[1:][number % 4] if kv_dtype else pages[number % 5],
                "group": groups[number % 7],
                "kv_heads": (1, 2, 8)[number % 3],
                "window": 200 if number % 2 else None,
                "soft_cap": 30.0 if number % 3 == 0 else None,
                "extras": (ROPE, BOTH, SINKS)[number % 3],
                "decode_tokens": (1, 4, 8)[number // 2 % 3],
            }
            name = "-".join(str(value) for value in (head_dim, *changes.values()) if not isinstance(value, frozenset))
            found.append(replace(MIXED, name=name, head_dim=head_dim, **changes))
            number += 1
    return [*found, replace(MIXED, name="float32", dtype="float32", kv_heads=2)]


def flash() -> list[flash_cases.Case]:
    """Every head size, with lengths that are and are not whole, and each option somewhere."""
    ragged, packed, everything = flash_cases.RAGGED, flash_cases.PACKED, flash_cases.EVERYTHING
    shapes = (
        {"extras": ragged, "group": 1},
        {"queries": 133, "keys": 1201, "extras": everything, "window": 100, "group": 3},
        {"extras": packed, "soft_cap": 30.0},
        {"queries": 1, "keys": 9, "batch": 1, "causal": "full", "extras": ragged | packed, "group": 8},
    )
    found = [
        replace(FLASH, name=f"flash {head_dim} {number}", head_dim=head_dim, **changes)
        for number, changes in enumerate(shapes)
        for head_dim in (64, 96, 128, 256)
    ]
    return [*found, replace(FLASH, name="flash float32", dtype="float32")]


def matmuls() -> list[MatmulCase]:
    """An 8B model's weights in every format, for few and for many tokens."""
    formats = {
        "w8a16": {},
        "w8a8": {"activations": "int8"},
        "w4a16 128": {"weight": "int4", "group": 128, "zeros": "given"},
        "w4a16 64": {"weight": "int4", "group": 64},
        "w4a8": {"weight": "int4", "group": 128, "activations": "int8"},
        "fp8": {"weight": "fp8"},
        "fp8 tiles": {"weight": "fp8", "group": 128, "rows": 128},
    }
    found = []
    for number, (name, changes) in enumerate(formats.items()):
        for tokens in (1, 256 if "w4" in name else 2048):
            features, outputs = ((4096, 6144), (14336, 4096), (4096, 28672))[number % 3]
            found.append(MatmulCase(f"{name} {tokens}", tokens, features, outputs, "bfloat16", **changes))
    return [*found, MatmulCase("logits", 16, 4096, 16032, "bfloat16"), MatmulCase("w8 float32", 3, 384, 1024)]


def grouped() -> list[GroupedCase]:
    """The experts of an 8x7B model in every format, for decoding and for prompts, and a shard of them."""
    found = []
    for number, weight in enumerate(("float", "int8", "float8_e4m3fn")):
        for rows in (2, 128, 4096):
            features, outputs = ((4096, 28672), (14336, 4096), (1792, 4096))[(number + rows) % 3]
            found.append(GroupedCase(f"experts {weight} {rows}", rows, 8, features, outputs, "bfloat16", weight))
    return [*found, GroupedCase("experts float32", 70, 64, 256, 160)]


def kernels_of(case: Any) -> int:
    """How many kernels of ours the program has: decode rows; writing and prefill; one otherwise."""
    return (case.decode_rows > 0) + 2 * (case.prefill_rows > 0) if isinstance(case, Case) else 1


def compile_case(case: Any, generation: Generation, mesh: Mesh) -> str:
    """Compile, check and tell. Raises SystemExit for a program that is not as it should be."""
    inputs = modelling.described(case, generation)
    buffers = buffers_of(case, inputs, generation)
    program = modelling.compiled(case, inputs, mesh)
    found, memory = program.as_text().count('custom_call_target="tpu_custom_call"'), program.memory_analysis()
    if found != kernels_of(case):
        raise SystemExit(f"{case.name}: {found} kernels of ours in the program, there should be {kernels_of(case)}")
    pool = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(inputs.get("kv")))
    if memory.alias_size_in_bytes < pool:
        raise SystemExit(f"{case.name}: {memory.alias_size_in_bytes} bytes are updated in place, the pool has {pool}")
    if pool and memory.temp_size_in_bytes > pool // 2 + (16 << 20):
        raise SystemExit(f"{case.name}: {memory.temp_size_in_bytes} bytes of temporary memory: is the pool copied?")
    return f"{found} kernels, {buffers / 2**20:.1f} MiB of VMEM for buffers, {memory.temp_size_in_bytes / 2**20:.1f} MiB temporary"


def buffers_of(case: Any, inputs: Any, generation: Generation) -> int:
    """Bytes of VMEM that the largest kernel of a case takes for its buffers, two of each kind that is copied ahead; what it computes with
    comes on top, and the compiler refuses what is over the kernel's limit. Raises SystemExit where buffers or limit are too large."""
    with dispatch.assumed(dispatch.Target("tpu", generation.kind)), tensorcore.recorded() as found:
        jax.eval_shape(lambda given: case.run(given, "tpu"), inputs)
    for call in (record.call for record in found):
        if not tensorcore.buffer_bytes(call) <= call.vmem < generation.vmem:
            told = f"buffers of {tensorcore.buffer_bytes(call)} bytes, limit {call.vmem}, {generation.vmem} bytes of VMEM"
            raise SystemExit(f"{case.name}: {call.name} on {generation.name}: {told}")
    return max(tensorcore.buffer_bytes(record.call) for record in found)


def shipped(generation: str) -> Iterator[Any]:
    """The tuning cases that a row of block sizes ships for: sizes are looked up as anywhere, so it is the rows that are compiled."""
    kind = BY_NAME[generation].kind
    for cases in (attention_cases, flash_cases, matmul_cases, grouped_cases):
        op = case_op(cases.TUNING[0])
        keys = [row.key for row in tuning.read(tuning.table_file(tuning.SHIPPED, kind, op)) if row.implementation == "tpu"]
        yield from (case for case in cases.TUNING if case.tuning_key() in keys)


def wanted(generations: list[str], *, everything: bool) -> Iterator[tuple[str, Any]]:
    """Which case for which generation: those of shipped rows all; of the others each generation gets the plain one of each op, and without
    `everything` the rest are dealt out."""
    for generation in generations:
        yield from ((generation, case) for case in shipped(generation))
    for op in (attention(), flash(), matmuls(), grouped()):
        for number, case in enumerate(op):
            for place, generation in enumerate(generations):
                if everything or number == 0 or number % len(generations) == place:
                    yield generation, case


def main() -> None:
    """Compile for one generation after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true", help="every case for every generation")
    parser.add_argument("--generation", choices=tuple(BY_NAME), action="append", help="only this one")
    options = parser.parse_args()
    generations = options.generation or list(BY_NAME)
    meshes = {}
    for name in generations:
        meshes[name] = modelling.mesh_of(BY_NAME[name])
    begin, count = time.perf_counter(), 0
    for generation, case in wanted(generations, everything=options.all):
        start = time.perf_counter()
        refused = dispatch.refusal(case_op(case), "tpu", dispatch.Target("tpu", BY_NAME[generation].kind), case.tuning_key())
        if refused is not None:
            raise SystemExit(f"{case.name} is refused: {refused}")
        told = compile_case(case, BY_NAME[generation], meshes[generation])
        count += 1
        print(f"{generation} {case.name}: {told}, {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{count} programs compiled with jax {jax.__version__} in {time.perf_counter() - begin:.0f} s")


def case_op(case: Any) -> str:
    """The op of a case: the folder its class is defined in."""
    return type(case).__module__.split(".")[1]


if __name__ == "__main__":
    main()
