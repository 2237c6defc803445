from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tensorcore, tuning
from pallas_kernels.attention import AttentionSpec
from pallas_kernels.dispatch import Target
from pallas_kernels.paged_attention import tpu, tpu_attend
from pallas_kernels.paged_attention.cases import NOTHING, TUNING, Case
from pallas_kernels.paged_attention.pool import side_by_side

FULL = Case("full", page_size=64, kv_heads=2, group=4, head_dim=128, dtype="bfloat16", extras=NOTHING, lengths="full")
BYTES = [
    pytest.param(replace(FULL, decode_rows=2, pages_per_row=16, kv_heads=1), 1.1, id="decode", marks=pytest.mark.ci),
    pytest.param(replace(FULL, prefill_rows=1, prefill_tokens=128, pages_per_row=4), 1.3, id="prefill", marks=pytest.mark.ci),
]


@pytest.mark.parametrize(("case", "most"), BYTES)
def test_bytes_that_are_copied(case, most, simulated):
    """Of those that must be: queries, results, and the keys and values that are seen; the new ones are written on top of that."""
    inputs = case.make(0, "tpu")
    with tensorcore.counted() as found:
        jax.jit(lambda inputs: case.run(inputs, "tpu"))(inputs).out.block_until_ready()
    new = inputs["k"].nbytes + inputs["v"].nbytes
    assert case.cost(inputs).bytes <= sum(found) <= most * (case.cost(inputs).bytes + 2 * new)


SHAPES = [(1, 8, None), (8, 4, None), (8, 8, "int8"), (32, 1, None)]


@pytest.mark.parametrize("device", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_vmem_is_enough_on_every_generation(device, monkeypatch):
    chip = tensorcore.generation(device)
    monkeypatch.setattr(tensorcore, "generation", lambda device: chip)
    for head_dim, (kv_heads, group, kv_dtype) in product((64, 96, 128, 256), SHAPES):
        key = {"page_size": 64, "kv_heads": kv_heads, "heads": kv_heads * group, "head_dim": head_dim, "dtype": "bfloat16"}
        sizes = tpu.Sizes(**tpu.heuristic("tpu", key | ({"kv_dtype": kv_dtype} if kv_dtype else {})))
        layout = side_by_side(kv_heads=kv_heads, head_dim=head_dim, dtype=jnp.bfloat16, kv_dtype=kv_dtype)
        kv = jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape(100, 64), each.dtype), layout)
        q = jax.ShapeDtypeStruct((4096, kv_heads * group, head_dim), jnp.bfloat16)
        for tokens_of_row, rows in ((1, 64), (8, 64), (0, 2)):
            plan = tpu.plan_of(q, kv, (rows, 512), spec=AttentionSpec(1.0), sizes=sizes, tokens_of_row=tokens_of_row)
            assert plan.vmem < chip.vmem
            assert tpu_attend.vmem_bytes(plan, q, kv) <= plan.vmem, (key, tokens_of_row)


def test_tuning_cases_have_sizes():
    for case in TUNING:
        key = case.tuning_key()
        assert tpu.Sizes(**tuning.sizes("paged_attention", "tpu", Target("tpu", "TPU v6 lite"), key)) in [
            tpu.Sizes(**found) for found in tpu.candidates("tpu", key)
        ]
