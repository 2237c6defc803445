import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, tensorcore, tuning
from pallas_kernels.dispatch import Target
from pallas_kernels.paged_attention import tpu
from pallas_kernels.paged_attention.cases import BOTH, ROPE, SINKS, Case

V6E = Target("tpu", "TPU v6 lite")
KEY = {"page_size": 64, "kv_heads": 8, "heads": 32, "head_dim": 128, "dtype": "bfloat16"}
SMALL = tpu.Sizes(decode_keys=64, decode_step=32, prefill_keys=64, prefill_step=32, prefill_lines=32)
SOON = [
    Case("decode", 4, page_size=32, pages_per_row=5, kv_heads=1, dtype="bfloat16", kv_dtype="int8", decode_tokens=2, extras=SINKS),
    Case("prefill", 0, 3, 60, pages_per_row=9, kv_heads=1, group=2, head_dim=128, dtype="bfloat16", window=37, soft_cap=5.0),
]
LATER = [
    Case("mixed", 3, 2, 60, page_size=32, pages_per_row=6, group=3, head_dim=128, window=50, extras=BOTH),
    Case("wide", 3, 2, 40, page_size=64, pages_per_row=3, kv_heads=1, group=8, head_dim=256, dtype="bfloat16", extras=BOTH),
    Case("middle", 3, 3, 90, page_size=32, pages_per_row=9, group=5, head_dim=96, dtype="bfloat16", window=77, extras=SINKS),
    Case("alone", 4, 2, 300, page_size=64, pages_per_row=5, group=1, dtype="bfloat16", soft_cap=8.0, extras=ROPE),
    Case("codes", 5, 2, 90, page_size=32, pages_per_row=9, dtype="bfloat16", kv_dtype="float8_e4m3fn", window=90, extras=SINKS),
    Case("codes_wide", 3, 2, 60, page_size=64, pages_per_row=3, head_dim=128, dtype="bfloat16", kv_dtype="int8", decode_tokens=8),
    Case("long_rows", 3, page_size=16, pages_per_row=9, kv_heads=1, dtype="bfloat16", decode_tokens=9),
    Case("heads", 3, 1, 20, page_size=16, pages_per_row=9, kv_heads=4, group=2, dtype="bfloat16", decode_tokens=3, soft_cap=8.0),
]


@pytest.mark.parametrize("case", SOON, ids=lambda case: case.name)
def test_small_blocks_against_float64(case, simulated, against_float64):
    with tuning.forced(SMALL._asdict()):
        against_float64("paged_attention", "tpu", case, range(8))


@pytest.mark.ci
@pytest.mark.parametrize("case", [*SOON, *LATER], ids=lambda case: case.name)
def test_small_blocks_at_length(case, simulated, against_float64):
    with tuning.forced(SMALL._asdict()):
        against_float64("paged_attention", "tpu", case, range(8, 28))


@pytest.mark.ci
def test_a_row_does_not_depend_on_its_neighbours(simulated):
    case = Case("rows", 4, page_size=32, pages_per_row=5, dtype="bfloat16", lengths="full")
    with tuning.forced(SMALL._asdict()):
        run = jax.jit(lambda inputs: case.run(inputs, "tpu").out)
        inputs = case.make(0, "tpu")
        wanted = np.asarray(run(inputs), np.float32)
        lengths = inputs["metadata"].kv_lengths.at[1:].set(1)
        inputs["positions"] = inputs["positions"].at[1:].set(0)
        inputs["metadata"] = type(inputs["metadata"])(inputs["metadata"].page_tables, *inputs_of(inputs, lengths), decode_rows=4)
        assert np.array_equal(np.asarray(run(inputs), np.float32)[0], wanted[0])


def inputs_of(inputs, lengths):
    return inputs["metadata"].query_starts, inputs["metadata"].query_lengths, lengths


def test_what_is_refused_and_why():
    assert tpu.refusal(V6E, KEY) is None
    assert tpu.refusal(V6E, KEY | {"head_dim": 64, "kv_dtype": "int8", "decode_tokens": 8}) is None
    assert "at least 16 for bfloat16, not of 8" in tpu.refusal(V6E, KEY | {"page_size": 8})
    assert "at least 32 for int8, not of 16" in tpu.refusal(V6E, KEY | {"page_size": 16, "kv_dtype": "int8"})
    assert "not of 48" in tpu.refusal(V6E, KEY | {"page_size": 48})
    assert dispatch.choose("paged_attention", "auto", V6E, KEY) == "tpu"


def test_the_pool_is_shardable_over_pages_and_kv_heads():
    layout = tpu.kv_layout(kv_heads=8, head_dim=64, dtype=jnp.bfloat16, kv_dtype="int8")
    assert layout.values.axes() == ("pages", "kv_heads", None, None)
    assert layout.values.shape(3, 64) == (3, 8, 64, 128)
    assert layout.scales.axes() == ("pages", "kv_heads", None)
    assert layout.scales.shape(3, 64) == (3, 8, 128)


@pytest.mark.ci
def test_long_tables_are_dealt_to_several_kernels(simulated, monkeypatch, against_float64):
    monkeypatch.setattr(tpu, "TABLE_WORDS", 10)
    case = Case("long", decode_rows=3, page_size=32, pages_per_row=5, kv_heads=1, group=2, dtype="bfloat16")
    with tensorcore.counted() as found:
        against_float64("paged_attention", "tpu", case, range(1))
    assert len(found) == 2
