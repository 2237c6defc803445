import numpy as np
import pytest

from pallas_kernels.flash_attention import cases
from pallas_kernels.flash_attention.cases import BENCH, CASES, TUNING, Case


@pytest.mark.parametrize("case", (*CASES, TUNING[0]), ids=lambda case: case.name)
def test_shapes(case):
    inputs = case.make(0)
    assert inputs["q"].shape == (case.batch, case.queries, case.kv_heads * case.group, case.head_dim)
    assert inputs["k"].shape == inputs["v"].shape == (case.batch, case.keys, case.kv_heads, case.head_dim)
    assert set(inputs) == {"q", "k", "v"} | case.extras
    assert inputs["q"].dtype == case.dtype
    assert set(case.tuning_key()) == {"kv_heads", "heads", "head_dim", "dtype"}


def test_what_lies_beyond_a_length_is_poisoned():
    inputs = Case("x", keys=200, causal="full", extras=frozenset({"kv_lengths"})).make(4)
    beyond = np.arange(200)[None] >= np.asarray(inputs["kv_lengths"])[:, None]
    for name in ("k", "v"):
        np.testing.assert_array_equal(np.isnan(np.asarray(inputs[name])).all(axis=(2, 3)), beyond)


def test_the_same_seed_gives_the_same_data():
    first, again, other = (Case("x").make(seed)["q"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_cost_counts_what_is_seen():
    whole = Case("x", batch=1, queries=8, keys=8, group=1).cost({})
    assert whole.operations == 4 * 64 * 2 * 36 and whole.bytes == 4 * 64 * 2 * (2 * 8 + 2 * 8)
    assert Case("x", batch=1, queries=8, keys=8, group=1, causal="full").cost({}).operations == 4 * 64 * 2 * 64
    ragged = Case("x", batch=2, queries=4, keys=9, group=1, extras=frozenset({"kv_lengths", "query_offsets"}))
    lengths = {"kv_lengths": np.array([3, 9]), "query_offsets": np.array([0, 5])}
    assert ragged.cost(lengths).operations == 4 * 64 * 2 * (1 + 2 + 3 + 3 + 6 + 7 + 8 + 9)


def test_large_arrays_are_drawn_on_the_device(monkeypatch):
    case = Case("x", dtype="bfloat16")
    drawn = case.make(0)
    monkeypatch.setattr(cases, "LARGE", 1)
    inputs = case.make(0)
    assert {name: (x.shape, x.dtype) for name, x in inputs.items()} == {name: (x.shape, x.dtype) for name, x in drawn.items()}
    assert not np.array_equal(inputs["k"], inputs["v"]) and not np.array_equal(inputs["q"], drawn["q"])


def test_bench_cases_attend_to_themselves():
    for case in BENCH:
        batch, length = map(int, case.name.split("_")[1].split("x"))
        assert (case.batch, case.queries, case.keys) == (batch, length, length) and not case.extras


def test_packed_sequences_lie_one_after_the_other():
    inputs = Case("x", keys=200, extras=frozenset({"query_offsets", "segment_ids"})).make(2)
    queries, keys = (np.asarray(ids) for ids in inputs["segment_ids"])
    assert (np.diff(keys) >= 0).all()
    assert keys.max() > 0
    for own, theirs, offset in zip(queries, keys, np.asarray(inputs["query_offsets"]), strict=True):
        np.testing.assert_array_equal(own, theirs[offset : offset + 64])
