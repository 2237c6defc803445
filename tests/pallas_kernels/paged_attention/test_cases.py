import dataclasses

import jax
import numpy as np
import pytest

from pallas_kernels.paged_attention import cases
from pallas_kernels.paged_attention.cases import BENCH, CASES, TUNING, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_are_consistent(case):
    for seed in range(5):
        inputs = case.make(seed)
        metadata, positions = inputs["metadata"], np.asarray(inputs["positions"])
        tables, starts, queries, lengths = (np.asarray(x) for x in jax.tree.leaves(metadata))
        owned = np.zeros(len(positions), int)
        for row in range(len(starts)):
            tokens = np.arange(starts[row], starts[row] + queries[row])
            owned[tokens] += 1
            np.testing.assert_array_equal(positions[tokens], np.arange(lengths[row] - queries[row], lengths[row]))
            if row < case.decode_rows:
                assert queries[row] <= case.decode_tokens and starts[row] == row * case.decode_tokens
            used = -(-lengths[row] // case.page_size)
            assert (tables[row, :used] > 0).all()
            assert (tables[row, used:] == 0).all()
        np.testing.assert_array_equal(owned, positions >= 0)
        used = tables[tables > 0]
        assert len(used) == len(set(used))


def test_memory_of_no_row_is_poisoned():
    inputs = Case("x", decode_rows=3, prefill_rows=2, prefill_tokens=9).make(3)
    kv = np.asarray(inputs["kv"])
    assert np.isnan(kv[0]).all()
    quantized = Case("x", decode_rows=3, prefill_rows=2, prefill_tokens=9, kv_dtype="float8_e4m3fn").make(3)["kv"]
    for part in quantized:
        assert np.array_equal(np.isnan(np.asarray(part, np.float32).reshape(*kv.shape[:4], -1)).any(-1), np.isnan(kv).any(-1))
    slots = ~np.isnan(kv).any(axis=(1, 2, 4))
    assert slots.sum() == np.asarray(inputs["metadata"].kv_lengths).sum()
    assert np.isnan(np.asarray(inputs["q"])).all(axis=(1, 2)).tolist() == (np.asarray(inputs["positions"]) < 0).tolist()


def test_the_same_seed_gives_the_same_data():
    first, again, other = (Case("x", decode_rows=2).make(seed) for seed in (1, 1, 2))
    assert np.array_equal(first["q"], again["q"], equal_nan=True)
    assert not np.array_equal(first["k"], other["k"], equal_nan=True)


def test_edges_are_drawn():
    case = Case("x", decode_rows=4, page_size=16, pages_per_row=4)
    lengths = np.concatenate([np.asarray(case.make(seed)["metadata"].kv_lengths) for seed in range(40)])
    assert {0, 1, 15, 16, 17, 64} <= set(lengths.tolist())


def test_tuning_cases_are_full():
    for case in TUNING:
        assert case.lengths == "full"
        assert case.prefill_tokens % max(case.prefill_rows, 1) == 0
        assert set(case.tuning_key()) == {"page_size", "kv_heads", "heads", "head_dim", "dtype"}
    assert Case("x", kv_dtype="int8").tuning_key()["kv_dtype"] == "int8"
    lengths = np.asarray(Case("x", decode_rows=2, lengths="full").make(0)["metadata"].kv_lengths)
    assert (lengths == 8 * 16).all()


def test_cost_counts_what_is_seen():
    case = Case("x", decode_rows=2, prefill_rows=1, prefill_tokens=16, window=20, lengths="full", pages_per_row=2)
    cost = case.cost(case.make(0))
    pairs = 2 * 20 + sum(min(position + 1, 20) for position in range(16, 32))
    assert cost.operations == 4 * 64 * 6 * pairs
    assert cost.bytes == 4 * 64 * (2 * 18 * 6 + 2 * 2 * (20 + 20 + 32))
    quantized = dataclasses.replace(case, kv_dtype="int8").cost(case.make(0))
    assert cost.bytes - quantized.bytes == (4 * 64 - 64 - 4) * 2 * 2 * (20 + 20 + 32)


@pytest.mark.ci
def test_large_pools_are_drawn_on_the_device(monkeypatch):
    monkeypatch.setattr(cases, "LARGE", 1)
    case = Case("x", decode_rows=3, dtype="bfloat16", lengths="full")
    inputs, other = case.make(0, "xla"), case.make(1, "xla")
    kv = np.asarray(inputs["kv"], np.float32)
    assert kv.shape == case.layout("xla").shape(25, 16) and abs(kv.std() - 1) < 0.02
    assert not np.array_equal(kv, np.asarray(other["kv"], np.float32))
    assert np.isnan(np.asarray(Case("x", decode_rows=3).make(0)["kv"])).any(), "ragged ones are always poisoned"
    assert np.isfinite(np.asarray(case.run(inputs, "xla").out, np.float32)).all()
    codes = dataclasses.replace(case, kv_dtype="float8_e4m3fn").make(0, "xla")["kv"]
    assert all(np.isfinite(np.asarray(part, np.float32)).all() for part in codes)
    padded = Case("x", prefill_rows=2, prefill_tokens=9, lengths="full").make(0)
    assert np.isnan(np.asarray(padded["q"][8])).all() and np.isfinite(np.asarray(padded["q"][:8])).all(), "padding too"


def test_bench_cases_are_full():
    for case in BENCH:
        assert case.lengths == "full" and case.dtype == "bfloat16" and case.kv_heads == 8
        rows, keys = map(int, case.name.split("_")[1].split("x"))
        assert case.kv_dtype is None or case.name.endswith(case.kv_dtype)
        assert case.decode_rows + case.prefill_rows == rows and case.page_size * case.pages_per_row == keys
        assert case.prefill_tokens == (rows * keys if case.prefill_rows else 0)
