"""Compile whole serving steps for TPU slices described by name, on a machine without a TPU, and check the compiled text.

    pip install -e ".[tpu]"
    python .ci/compile_steps_for_tpu.py [--all]

Llama 3.1's 8B and 70B shapes with tensor parallelism on v5e-8, v6e-8, v5p (2x2x1) and 7x (2x2x1); weights of 70B in int8 on v5e-8, where
bfloat16 cannot fit. Two layers of each, or with --all every layer. Of a decode step and a mixed step: kernels of ours for each layer, the
collectives that the sharding implies and no others, the pool updated in place, no copy of a weight but one that is known: XLA brings
bfloat16 weights of attention outputs, stored [embed, kv_heads, group, head_dim], into the order of a matrix, once a layer.
"""

import argparse
import os
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

from jaxinfer.config import EngineConfig, MeshShape, from_arguments
from jaxinfer.models import find
from jaxinfer.planner import collectives, topology
from jaxinfer.planner.estimate import Choice, Wish
from jaxinfer.planner.slices import parse
from jaxinfer.step.buckets import Bucket

SLICES = {"v5e-8": 8, "v6e-8": 8, "v5p-8": 4, "tpu7x-8": 8}  # devices
PAGES = 513  # of the pool, guard page included
COPIED = re.compile(r" = (?P<dtype>[a-z]+\d*[a-z0-9]*)\[(?P<shape>[\d,]*)\](?P<layout>\S*) (copy|transpose)\(")
ARGUMENT = re.compile(r" = (?P<dtype>[a-z]+\d*[a-z0-9]*)\[(?P<shape>[\d,]*)\]\S* parameter\((?P<number>\d+)\)")
KERNEL = 'custom_call_target="tpu_custom_call"'


def programs(name: str, where: str, quantize: str | None, layers: int | None) -> Any:
    """The planner's programs for a shape on a slice, lowered for nothing yet."""
    values = dict(find.find_shape(name))
    if layers is not None:
        values["num_hidden_layers"] = layers
    config = from_arguments(EngineConfig, {"quantize": quantize, "max_sequences": 64, "max_step_tokens": 512})
    piece, mesh = parse(where), MeshShape(data=1, tensor=SLICES[where])
    choice = Choice(piece, mesh, Wish(values, config, 8192, 256, None, "latency", None), tuple(topology.describe(piece)))
    with choice.target():
        sizing = choice.sizing()
        return choice, sizing, sizing.program(replace(sizing.empty_pool, pages=PAGES))


def held(key: Bucket, program: Any, sizing: Any) -> list[str]:
    """What is wrong with a compiled step."""
    text, layers = program.compiled(key).as_text(), len(program.config.kv_specs)
    wrong, mesh_size = [], program.config.placement.mesh.size
    kernels, wanted = text.count(KERNEL), layers * ((key.decode_rows > 0) + 2 * (key.prefill_tokens > 0))
    if kernels < wanted:
        wrong.append(f"{kernels} kernels of ours, there should be {wanted} of attention")
    found = {(each.kind): each.count for each in _by_kind(collectives.in_text(text))}
    implied = {each.kind: each.count for each in collectives.implied(
        sizing.model.graph, collectives.sharded(sizing.model.graph, sizing.placement), key.tokens, key.rows)}  # fmt: skip
    if found != implied:
        wrong.append(f"collectives {found}, the sharding implies {implied}")
    memory = program._compiled[key].memory_analysis()
    pool = sum(prod(spec.shape) * spec.dtype.itemsize for spec in jax.tree.leaves(program.config.kv_specs))
    weights, pools, *rest = program.call(key).arguments
    results = 0 if key.prefill_tokens else sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(rest[-1]))
    if memory.alias_size_in_bytes < pool // mesh_size + results:
        wrong.append(f"{memory.alias_size_in_bytes} bytes are updated in place, the pool has {pool // mesh_size}, results {results}")
    found = copies(text, len(jax.tree.leaves((weights, pools))), least=1 << 20)
    shape = sizing.model.graph.config.heads
    known = _kind_of("bf16", f"{sizing.model.graph.config.hidden_size},{shape.kv_heads // mesh_size},{shape.group},{shape.head_dim}")
    if found.pop(known, 0) > layers:
        wrong.append(f"{known} is copied more than once a layer")
    wrong += [f"{array} is copied {count} times" for array, count in found.items()]
    return wrong


def copies(text: str, first: int, least: int) -> Counter[Any]:
    """Of the first arguments (weights, pools) those of at least so many bytes that the program makes again in another order."""
    entry = text[text.index("\nENTRY ") :]
    given = {_kind_of(match["dtype"], match["shape"]) for match in ARGUMENT.finditer(entry) if int(match["number"]) < first}
    found: Counter[Any] = Counter()
    for match in COPIED.finditer(text):
        size = collectives.SIZES.get(match["dtype"], 1) * prod(_sizes(match["shape"]))
        in_hbm = "S(" not in match["layout"]  # another memory space: copied ahead of use
        if in_hbm and size >= least and _kind_of(match["dtype"], match["shape"]) in given:
            found[_kind_of(match["dtype"], match["shape"])] += 1
    return found


def _sizes(shape: str) -> list[int]:
    return [int(each) for each in shape.split(",") if each]


def _kind_of(dtype: str, shape: str) -> tuple[str, tuple[int, ...]]:
    """What an array and its transposes share."""
    return dtype, tuple(sorted(size for size in _sizes(shape) if size > 1))


def _by_kind(found: tuple[Any, ...]) -> list[Any]:
    kinds = dict.fromkeys(each.kind for each in found)
    return [collectives.Collective(kind, 0, sum(each.count for each in found if each.kind == kind)) for kind in kinds]


def main() -> None:
    """Compile and check; ends with what is wrong, if anything is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true", help="every layer")
    parser.add_argument("--only", help="words that a line must contain, as in 'v5e-8 llama-3.1-8b'")
    options = parser.parse_args()
    failures = 0
    for where in SLICES:
        for name in ("llama-3.1-8b", "llama-3.1-70b"):
            quantize = "int8" if where == "v5e-8" and "70b" in name else None
            if options.only and not all(word in f"{where} {name}" for word in options.only.split()):
                continue
            choice, sizing, program = programs(name, where, quantize, None if options.all else 2)
            for key in (Bucket(0, 0, 64), Bucket(512, 64, 64)):
                begin = time.perf_counter()
                with choice.target():
                    program.compile(lambda *_: None, [key])
                size = program.sizes[key]
                wrong = held(key, program, sizing)
                failures += bool(wrong)
                print(
                    f"{where} {name} {quantize or 'bfloat16'} {key}: {time.perf_counter() - begin:.1f} s, temporary "
                    f"{size.temporary / 2**20:.1f} MiB, code {size.code / 2**20:.1f} MiB, {'; '.join(wrong) or 'as it should be'}",
                    flush=True,
                )
    print(f"jax {jax.__version__}, numpy {np.__version__}")
    if failures:
        raise SystemExit(f"{failures} programs are not as they should be")


if __name__ == "__main__":
    main()
