import re
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, flash_attention, hopper, hopper_tiles
from pallas_kernels.dispatch import Target
from pallas_kernels.flash_attention import gpu, reference
from pallas_kernels.flash_attention.cases import EVERYTHING, PACKED, RAGGED, TUNING, Case

H200 = Target("gpu", "NVIDIA H200")
KEY = {"kv_heads": 8, "heads": 32, "head_dim": 128, "dtype": "bfloat16"}
TOLERANCE = {"float16": 5e-4, "bfloat16": 4e-3}  # relative Frobenius error
SOON = [
    Case("window", queries=90, keys=300, kv_heads=1, window=100, soft_cap=4.0, extras=EVERYTHING, dtype="float16"),
    Case("packed", queries=20, keys=300, kv_heads=1, group=4, window=70, extras=EVERYTHING | PACKED, dtype="bfloat16"),
]
LATER = [
    Case("odd", queries=133, keys=201, group=4, extras=RAGGED, dtype="bfloat16"),
    Case("one", queries=1, keys=1, group=1, batch=1, dtype="bfloat16"),
    Case("full", queries=5, keys=400, kv_heads=1, group=8, head_dim=128, causal="full", extras=RAGGED, dtype="bfloat16"),
    Case("full_packed", batch=3, queries=140, keys=260, kv_heads=1, causal="full", extras=RAGGED | PACKED, dtype="float16"),
    Case("training", queries=300, keys=300, group=2, head_dim=128, extras=PACKED, dtype="bfloat16"),
    Case("d96", queries=20, keys=30, group=16, head_dim=96, extras=EVERYTHING | PACKED, dtype="bfloat16"),
    Case("d256", queries=70, keys=300, group=3, head_dim=256, window=64, extras=EVERYTHING, dtype="bfloat16"),
    Case("many_heads", queries=40, keys=40, kv_heads=1, group=17, batch=1, dtype="float16"),
    Case("behind", queries=200, keys=64, kv_heads=1, group=2, window=30, extras=RAGGED, dtype="bfloat16"),
]


@pytest.fixture
def jax_is_new(monkeypatch):
    """Refusals other than that of an old jax, on any jax."""
    if jax.__version_info__ < (0, 11):
        monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))


def run_of(case):
    return jax.jit(lambda inputs: case.run(inputs, "gpu")).lower(case.make(0)).compile()


def float64(case):
    """The reference, on the same 16-bit numbers."""
    names = dict.fromkeys(("kv_lengths", "query_offsets", "sinks", "segment_ids"))
    meaning = jax.jit(lambda inputs: reference.flash_attention(**names | inputs, spec=case.spec, causal=case.causal))

    def run(inputs):
        arrays = {name: x for name, x in inputs.items() if name != "segment_ids"}
        kinds = {name: np.int32 if jnp.issubdtype(x.dtype, jnp.integer) else np.float64 for name, x in arrays.items()}
        with jax.enable_x64(True):
            return np.asarray(meaning(inputs | {name: jnp.asarray(np.asarray(inputs[name]).astype(kind)) for name, kind in kinds.items()}))

    return run


def close(case, seeds):
    run, oracle = run_of(case), float64(case)
    for seed in seeds:
        inputs = case.make(seed)
        found, wanted = run(inputs), oracle(inputs)
        assert found.dtype == case.dtype
        error = np.linalg.norm(np.asarray(found, np.float64) - wanted) / max(np.linalg.norm(wanted), 1e-30)
        assert error <= TOLERANCE[case.dtype], f"seed {seed}: {error}"


LONGER = [pytest.param(case, marks=(pytest.mark.ci, pytest.mark.interpreter)) for case in LATER]  # for CI's pass with the newest jax


@pytest.mark.parametrize("case", [*SOON, *LONGER], ids=attrgetter("name"))
def test_close_to_float64(interpreted, case):
    close(case, range(3))


def test_an_entry_depends_on_itself_alone(interpreted):
    """Bit for bit, whatever the neighbour's length; and an empty entry gives nothing."""
    case = Case("x", queries=30, keys=150, kv_heads=1, group=2, causal="full", extras=RAGGED, dtype="bfloat16")
    run, inputs = run_of(case), case.make(1) | {"kv_lengths": jnp.asarray([100, 150], jnp.int32)}
    inputs |= {name: jnp.nan_to_num(inputs[name]).at[0, 100:].set(jnp.nan) for name in ("k", "v")}
    together = np.asarray(run(inputs), np.float32)
    inputs |= {name: inputs[name].at[1].set(jnp.nan) for name in ("k", "v")} | {"kv_lengths": jnp.asarray([100, 0], jnp.int32)}
    alone = np.asarray(run(inputs), np.float32)
    assert together.any(axis=-1).all()
    assert np.array_equal(together[0], alone[0])
    assert not alone[1].any()


@pytest.mark.parametrize(("queries", "size"), [(1, 128), (128, 128), (300, 128), (20, 32)])
def test_tiles_cover_the_queries(queries, size):
    lengths, offsets = jnp.asarray([7, 9, 400], jnp.int32), jnp.asarray([0, 3, 5], jnp.int32)
    tiles = np.asarray(gpu._tiles(queries, size, lengths, offsets, causal="causal"))
    for row in range(3):
        place, _, first, tokens, stop = tiles[tiles[:, 1] == row].T
        assert [x for a, n in sorted(zip(place, tokens, strict=True)) for x in range(a, a + n)] == list(range(queries))
        assert (first == place + offsets[row]).all()
        assert (stop == lengths[row]).all()
    assert (np.diff(tiles[:, 1]) >= 0).all(), "entry after entry: the kernel begins at the end"
    assert (np.asarray(gpu._tiles(queries, size, lengths, lengths, causal="full"))[:, 2] >= tiles[:, 4]).all()


def test_ids_of_lines_follow_the_tiles():
    own, ids = gpu.Queries(4), jnp.arange(2 * 70, dtype=jnp.int32).reshape(2, 70)
    size = hopper_tiles.CONSUMERS * own.tokens
    tiles = np.asarray(gpu._tiles(70, size, *[jnp.zeros(2, jnp.int32)] * 2, causal="causal"))
    lines = np.asarray(gpu._lines(ids, own)).reshape(-1, hopper_tiles.CONSUMERS, hopper.TILE)
    for (place, row, _, tokens, _), mine in zip(tiles, lines, strict=True):
        for token in range(tokens):
            warpgroup, at = divmod(token, own.tokens)
            assert (mine[warpgroup, at :: own.tokens] == ids[row, place + token]).all()


@pytest.mark.parametrize(
    ("queries", "group", "heads"), [(1, 1, 1), (1, 4, 4), (1, 16, 8), (1, 6, 2), (1, 3, 1), (64, 8, 2), (128, 8, 1), (33, 8, 4)]
)
def test_heads_share_tiles_of_few_queries(queries, group, heads):
    assert gpu._together(queries, group) == heads


def test_arrays_are_padded_only_where_they_must_be():
    x = jnp.ones((2, 136, 3, 64), jnp.bfloat16)
    text = jax.jit(lambda x: gpu._matrix(x, 128)).lower(x).compile().as_text()
    assert not re.search(r" (pad|fusion)\(", text.split("ENTRY")[1])
    assert gpu._matrix(x[:, :130], 128).shape == (2, 136, 192)
    assert gpu._matrix(x[:, :3], 128).shape == (2, 128, 192)


@pytest.mark.parametrize(
    ("target", "changes", "reason"),
    [
        (H200, {}, None),
        (Target("gpu", "NVIDIA H100 80GB HBM3"), {"head_dim": 96, "dtype": "float16", "heads": 128}, None),
        (Target("gpu", "NVIDIA B200"), {}, "Hopper.*this is NVIDIA B200"),
        (Target("cpu", "cpu"), {}, "Hopper"),
        (H200, {"dtype": "float32"}, "not in float32"),
        (H200, {"head_dim": 80}, "head_dim 64, 96, 128, 256, not 80"),
    ],
)
def test_refusal(target, changes, reason, jax_is_new):
    found = gpu.refusal(target, KEY | changes)
    assert found is None if reason is None else re.search(reason, str(found))


def test_an_old_jax_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "jax 0.11 or newer" in str(gpu.refusal(H200, KEY))


def test_by_name_on_a_machine_without_it():
    inputs = Case("x", dtype="bfloat16").make(0)
    with pytest.raises(NotImplementedError, match="flash_attention cannot run implementation='gpu'"):
        flash_attention(**inputs, spec=Case("x").spec, causal="causal", implementation="gpu")


def test_auto_takes_it_where_it_can(jax_is_new):
    assert dispatch.choose("flash_attention", "auto", H200, KEY) == "gpu"
    assert dispatch.choose("flash_attention", "auto", H200, KEY | {"dtype": "float32"}) == "xla"
    assert any(gpu.refusal(H200, case.tuning_key()) is None for case in TUNING)


def test_candidates_fit():
    for head_dim in hopper.HEAD_DIMS:
        key = KEY | {"head_dim": head_dim}
        assert gpu.heuristic("gpu", key) in gpu.candidates("gpu", key)
        assert all(hopper_tiles.shared_bytes(head_dim, **sizes) <= hopper.SHARED_BYTES for sizes in gpu.candidates("gpu", key))
