import dataclasses
import os
import re
import subprocess
import sys
from functools import partial
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PagedMetadata, dispatch, hopper, paged_attention, tuning
from pallas_kernels.dispatch import Target
from pallas_kernels.paged_attention import gpu, gpu_plan, xla
from pallas_kernels.paged_attention.cases import BOTH, ROPE, SINKS, TUNING, Case

H200 = Target("gpu", "NVIDIA H200")
KEY = {"page_size": 64, "kv_heads": 8, "heads": 32, "head_dim": 128, "dtype": "bfloat16"}
NEW = jax.__version_info__ >= (0, 11)
SMALL = gpu.Sizes(decode_longest=64, decode_longest_many=64, decode_stages=2, prefill_keys=128, prefill_stages=2)
SOON = [
    Case("tokens", decode_rows=3, page_size=64, pages_per_row=5, kv_heads=1, group=16, dtype="bfloat16", decode_tokens=8, extras=SINKS),
    Case("codes", decode_rows=3, page_size=64, pages_per_row=6, kv_heads=2, group=4, dtype="bfloat16", decode_tokens=2, kv_dtype="int8"),
    Case("prefill_codes", 0, 2, 70, page_size=32, pages_per_row=9, kv_heads=1, dtype="bfloat16", kv_dtype="float8_e4m3fn"),
    Case("decode_chunks", decode_rows=4, page_size=64, pages_per_row=6, kv_heads=1, group=4, dtype="bfloat16", extras=BOTH),
    Case("prefill_cap", prefill_rows=3, prefill_tokens=100, pages_per_row=18, kv_heads=1, dtype="float16", window=37, soft_cap=5.0),
]
LATER = [
    Case("wide", 3, 2, 40, page_size=128, pages_per_row=3, kv_heads=1, group=16, head_dim=256, dtype="bfloat16", extras=BOTH),
    Case("middle", 3, 3, 90, page_size=32, pages_per_row=9, group=5, head_dim=96, dtype="bfloat16", window=77, extras=SINKS),
    Case("alone", 4, 2, 300, page_size=64, pages_per_row=5, group=1, head_dim=128, dtype="float16", soft_cap=8.0, extras=ROPE),
    Case("narrow", 5, 3, 120, page_size=8, pages_per_row=45, group=8, dtype="bfloat16", window=100, extras=BOTH),
    Case("codes_mixed", 5, 2, 90, page_size=32, pages_per_row=12, dtype="bfloat16", kv_dtype="int8", window=90, extras=SINKS),
    Case("codes_wide", 3, 2, 60, page_size=128, pages_per_row=3, head_dim=128, dtype="bfloat16", kv_dtype="float8_e4m3fn", extras=BOTH),
    Case("codes_middle", 3, 2, 60, page_size=64, pages_per_row=5, head_dim=96, dtype="bfloat16", kv_dtype="int8", decode_tokens=4),
    Case("tokens_window", 4, 1, 20, page_size=32, pages_per_row=9, group=5, dtype="float16", decode_tokens=3, window=70, soft_cap=8.0),
    Case("one_page", 2, 1, 20, page_size=256, pages_per_row=1, group=2, dtype="bfloat16"),
]
name_of = attrgetter("name")
BY_XLA, BY_KERNEL = 1 << 30, 1  # who rotates and writes: steps of so many tokens are the kernel's


def longer(cases):
    """For CI's pass with the newest jax."""
    return [pytest.param(case, marks=(pytest.mark.ci, pytest.mark.interpreter)) for case in cases]


@pytest.fixture
def jax_is_new(monkeypatch):
    """Refusals other than that of an old jax, on any jax."""
    if not NEW:
        monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))


def run_of(case, sizes=SMALL):
    """The compiled op with small chunks."""
    with tuning.forced(sizes._asdict()):
        return jax.jit(lambda inputs: case.run(inputs, "gpu")).lower(case.make(0, "gpu")).compile()


def close(case, seeds, write_from=BY_XLA):
    """Against XLA in float32 on the same 16-bit numbers."""
    run, wide = run_of(case, SMALL._replace(write_from=write_from)), dataclasses.replace(case, dtype="float32")
    oracle = jax.jit(lambda inputs: wide.run(inputs, "xla"))
    for seed in seeds:
        inputs = case.make(seed, "gpu")
        widened = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x, inputs)
        found, wanted = np.asarray(run(inputs).out, np.float32), np.asarray(oracle(widened).out)
        tolerance = 0.004 if case.dtype == "float16" else 0.03 if case.kv_dtype is None else 0.06
        np.testing.assert_allclose(found, wanted, rtol=0.01, atol=tolerance, err_msg=f"seed {seed}")  # bfloat16 rounds by the size
        padding = np.asarray(inputs["positions"]) < 0
        assert not found[padding].any()


@pytest.mark.parametrize("case", [*SOON, *longer(LATER)], ids=name_of)
def test_close_to_xla(interpreted, case):
    close(case, range(3))


@pytest.mark.parametrize("case", [SOON[1], SOON[3], *longer([SOON[0], SOON[2], SOON[4], *LATER])], ids=name_of)
def test_close_to_xla_where_a_kernel_writes(interpreted, case):
    close(case, range(2), BY_KERNEL)


def without(inputs, rows):
    """The same step in which other rows are empty and their pages are garbage."""
    metadata = inputs["metadata"]
    starts, queries, lengths = (np.array(x) for x in (metadata.query_starts, metadata.query_lengths, metadata.kv_lengths))
    positions, tables = np.array(inputs["positions"]), np.array(metadata.page_tables)
    garbage = np.concatenate([tables[row][tables[row] > 0] for row in rows])
    for row in rows:
        positions[starts[row] : starts[row] + queries[row]] = -1
        queries[row] = lengths[row] = tables[row] = 0
    arrays = (jnp.asarray(x) for x in (tables, starts, queries, lengths))
    metadata = PagedMetadata(*arrays, metadata.decode_rows, metadata.decode_tokens)
    kv = inputs["kv"]
    if garbage.size:
        kv = jax.tree.map(lambda part: part.at[garbage].set(jnp.asarray(77 if part.dtype == jnp.int8 else jnp.nan, part.dtype)), kv)
    return inputs | {"metadata": metadata, "positions": jnp.asarray(positions), "kv": kv}


@pytest.mark.parametrize(("kv_dtype", "tokens"), [(None, 1), ("int8", 2)])
def test_a_row_depends_on_itself_alone(interpreted, kv_dtype, tokens):
    """Bit for bit, whatever the neighbours' lengths."""
    case = Case("x", 3, 3, 60, page_size=32, pages_per_row=10, kv_heads=1, dtype="bfloat16", window=90, extras=SINKS)
    case = dataclasses.replace(case, kv_dtype=kv_dtype, decode_tokens=tokens)
    run = run_of(case)
    inputs = case.make(5, "gpu")
    together, metadata = np.asarray(run(inputs).out), inputs["metadata"]
    rows = range(len(metadata.kv_lengths))
    for row in rows:
        if metadata.query_lengths[row] > 0:
            alone = np.asarray(run(without(inputs, set(rows) - {row})).out)
            mine = slice(int(metadata.query_starts[row]), int(metadata.query_starts[row] + metadata.query_lengths[row]))
            assert together[mine].any()
            assert np.array_equal(together[mine], alone[mine]), f"row {row}"


def test_pages_behind_the_window_may_be_anybodys(interpreted):
    """Freed pages of a row, NaN included, change nothing: what a window hides is masked in the values too."""
    case = Case("x", 2, 1, 30, page_size=16, pages_per_row=12, kv_heads=1, dtype="bfloat16", window=20, extras=SINKS)
    inputs = case.make(3, "gpu")
    metadata = inputs["metadata"]
    hidden = np.asarray(metadata.kv_lengths - metadata.query_lengths - 20)[:, None] >= (np.arange(12)[None] + 1) * 16
    assert hidden.any()
    freed = dataclasses.replace(metadata, page_tables=jnp.where(hidden, 0, metadata.page_tables))
    run = run_of(case)
    assert np.array_equal(run(inputs).out, run(inputs | {"metadata": freed}).out)


def test_padding_gives_nothing(interpreted):
    case = Case("x", 2, 1, 8, pages_per_row=2, kv_heads=1, dtype="bfloat16", extras=SINKS)
    result = run_of(case)(without(case.make(0, "gpu"), {0, 1, 2}))
    assert not np.asarray(result.out).any()


def test_a_window_reaches_back_from_the_first_token():
    """A row of 5 tokens whose first sees 66 keys, 3 at a time: from key 63 on, in two blocks, and there is room for both."""
    stop, sees = jnp.array([70], jnp.int32), jnp.array([66], jnp.int32)
    items = gpu.cut_rows(stop, sees, window=3, wanted=1, longest=4096, capacity=640, tokens=5)
    assert items.fields[: int(items.total[0])].tolist() == [[0, 0, 0, 2, 70, 66]]


@pytest.mark.parametrize(("wanted", "longest"), [(1, 4096), (3, 128), (33, 2048)])
@pytest.mark.parametrize("window", [None, 1, 64, 5000])
def test_rows_are_cut_whole(window, wanted, longest):
    """Each row's items are its blocks in order, at most MAX_CHUNKS of them, and the same whatever the others are."""
    capacity, rng = 64 * 64 * 40, np.random.default_rng(0)
    stop = np.concatenate([[0, 1, 63, 64, 65, capacity, capacity - 1, 32 * 128, 32 * 128 + 1], rng.integers(0, capacity, 20)])
    stop = stop.astype(np.int32)
    cut = jax.jit(partial(gpu.cut_rows, window=window, wanted=wanted, longest=longest, capacity=capacity))
    items = cut(jnp.asarray(stop), jnp.asarray(stop))
    fields, counts = np.asarray(items.fields[: int(items.total[0])]), np.asarray(items.counts)
    assert int(items.total[0]) == counts.sum() <= len(items.fields)
    assert counts.max() <= gpu.MAX_CHUNKS
    for row, keys in enumerate(stop):
        mine = fields[fields[:, 0] == row]
        assert len(mine) == counts[row]
        assert mine[:, 1].tolist() == list(range(counts[row]))
        assert (mine[:, 3] > 0).all() and mine[:, 3].max(initial=0) <= max(2, longest // 64, -(-capacity // 64 // gpu.MAX_CHUNKS))
        assert mine[:-1, 3].min(initial=99999) >= mine[:, 3].max(initial=0), "chunks of one length, the last may be shorter"
        assert (mine[:, 4] == keys).all()
        floor = 0 if window is None else max(0, keys - window)
        blocks = [block for _, _, first, count, _, _ in mine for block in range(first, first + count)]
        assert blocks == list(range(floor // gpu_plan.KEYS, -(-keys // gpu_plan.KEYS)) if keys else [])
        alone = cut(*(jnp.asarray(stop[row : row + 1]),) * 2)
        assert np.array_equal(np.asarray(alone.fields[: counts[row], 1:]), mine[:, 1:])


@pytest.mark.parametrize(
    ("target", "changes", "reason"),
    [
        (H200, {}, None),
        (Target("gpu", "NVIDIA H100 80GB HBM3"), {}, None),
        (Target("gpu", "NVIDIA GH200 480GB"), {"head_dim": 64, "dtype": "float16", "page_size": 8, "heads": 128}, None),
        (Target("gpu", "NVIDIA B200"), {}, "Hopper.*this is NVIDIA B200"),
        (Target("gpu", "NVIDIA A100-SXM4-80GB"), {}, "Hopper"),
        (Target("cpu", "cpu"), {}, "Hopper"),
        (H200, {"dtype": "float32"}, "bfloat16 or float16, not in float32"),
        (H200, {"head_dim": 80}, "head_dim 64, 96, 128, 256, not 80"),
        (H200, {"page_size": 24}, "pages of 8, 16.*not of 24"),
        (H200, {"page_size": 4}, "not of 4"),
        (H200, {"heads": 17 * 8}, "16 query heads per kv head, not for 17"),
        (H200, {"decode_tokens": 8, "kv_dtype": "int8"}, None),
        (H200, {"decode_tokens": 9}, "up to 8 tokens of a decode row, not 9; make longer rows prefill rows"),
        (H200, {"kv_dtype": "float8_e4m3fn", "head_dim": 256}, "float8_e4m3fn keys and values of head_dim up to 128.*not 256"),
        (H200, {"kv_dtype": "int8", "page_size": 16}, "int8 keys and values in pages of 32 tokens and more, not 16"),
        (H200, {"kv_dtype": "int8", "dtype": "float16"}, "int8 keys and values for bfloat16 activations only, not for float16"),
    ],
)
def test_refusal(target, changes, reason, jax_is_new):
    found = gpu.refusal(target, KEY | changes)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(reason, found)
    assert gpu.refusal(H200, {"head_dim": 128, "dtype": "bfloat16"}) is None


def test_an_old_jax_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "jax 0.11 or newer" in str(gpu.refusal(H200, KEY))


def test_by_name_on_a_machine_without_it():
    case = Case("x", decode_rows=1, dtype="bfloat16")
    inputs = case.make(0)
    order = [inputs[name] for name in ("q", "k", "v", "positions", "kv", "metadata")]
    with pytest.raises(NotImplementedError, match="paged_attention cannot run implementation='gpu'"):
        paged_attention(*order, spec=case.spec, rope=None, implementation="gpu")


def test_auto_falls_to_the_same_layout(jax_is_new):
    assert dispatch.choose("paged_attention", "auto", H200, KEY) == "gpu"
    assert dispatch.choose("paged_attention", "auto", H200, KEY | {"dtype": "float32"}) == "xla"
    assert gpu.kv_layout is xla.kv_layout


def test_others_never_import_mosaic():
    """The package, and what runs on a CPU."""
    code = (
        "import sys, pallas_kernels, jax.numpy\n"
        "pallas_kernels.kv_layout('auto', kv_heads=1, head_dim=64, dtype=jax.numpy.float32)\n"
        "sys.exit(any('pallas.mosaic_gpu' in name or 'hopper' in name for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_candidates_fit():
    quantized = [{"head_dim": head_dim, "kv_dtype": "int8"} for head_dim in (64, 96, 128)]
    for changes in [*({"head_dim": head_dim} for head_dim in hopper.HEAD_DIMS), *quantized]:
        key = KEY | changes
        first, *rest = gpu.candidates("gpu", key)
        assert first == gpu.heuristic("gpu", key)
        assert rest
        for sizes in (first, *rest):
            assert gpu.fits(gpu.Sizes(**sizes), key["head_dim"], codes="kv_dtype" in key)
    assert not gpu.fits(SMALL._replace(decode_stages=9), 128)


def test_a_kernel_writes_from_one_token_on_where_heads_can_be_dealt_out():
    """An 8B model's 8 kv heads, or the one that a device of eight has; not one kv head of 64 features, which fills half a warpgroup."""
    shapes = [KEY, KEY | {"kv_heads": 1, "heads": 4}, KEY | {"kv_heads": 1, "heads": 8, "head_dim": 64}]
    assert [gpu.heuristic("gpu", key)["write_from"] for key in shapes] == [1, 1, gpu.COPY_FROM]


def test_some_tuning_cases_are_for_it(jax_is_new):
    assert any(gpu.refusal(H200, case.tuning_key()) is None for case in TUNING)


@pytest.mark.skipif(not NEW, reason="cannot be traced before")
@pytest.mark.parametrize(
    ("changes", "sizes", "counts", "in_place"),
    [
        ({}, {"decode_merges": 1}, True, True),
        ({"decode_tokens": 3, "group": 5}, {"decode_merges": 1}, True, True),
        ({}, {"decode_merges": 0}, True, False),
        ({}, {"decode_merges": 1}, False, False),
        ({"extras": SINKS}, {"decode_merges": 1}, True, False),
    ],
)
def test_who_ends_a_row_merges_it_where_blocks_are_counted(monkeypatch, changes, sizes, counts, in_place):
    """Traced for an H200; what comes of it a card has to show."""
    monkeypatch.setattr(hopper, "cores", lambda: 132)
    case = Case("merged", **({"decode_rows": 3, "page_size": 64, "pages_per_row": 6, "kv_heads": 2, "dtype": "bfloat16"} | changes))
    inputs = case.make(0, "reference")

    def run(inputs):
        return case.run(case.counted(inputs, jax.new_ref(jnp.zeros(10_000, jnp.int32)) if counts else None), "gpu")

    with dispatch.assumed(H200), tuning.forced(SMALL._replace(**sizes)._asdict()):
        traced = str(jax.make_jaxpr(run)(inputs))
    assert ("last.<locals>.count" in traced) is in_place
    assert traced.count("mpmd_map[") == (2 if in_place else 3)  # kernels: writing, attention, merging
