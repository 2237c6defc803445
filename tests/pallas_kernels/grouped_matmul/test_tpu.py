import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, tensorcore
from pallas_kernels.dispatch import Target
from pallas_kernels.grouped_matmul import tpu
from pallas_kernels.grouped_matmul.cases import TUNING, Case

V5E = Target("tpu", "TPU v5 lite")
SOON = [
    Case("rows", 37, 3, 256, 160, "bfloat16", rests="some"),  # the second tile is short
    Case("codes", 5, 4, 128, 256, "bfloat16", "int8", rests="some"),
]
LATER = [
    Case("several_blocks", 150, 2, 128, 128, "float32"),
    Case("many_groups", 20, 9, 128, 64, "bfloat16", rests="some"),
    Case("float8", 20, 3, 256, 256, "bfloat16", "float8_e4m3fn", rests="some"),
    Case("short_codes", 33, 2, 128, 160, "float32", "int8"),
]


@pytest.mark.parametrize("case", SOON, ids=lambda case: case.name)
def test_against_float64(case, simulated, against_float64):
    against_float64("grouped_matmul", "tpu", case, range(2))


@pytest.mark.ci
@pytest.mark.parametrize("case", [*SOON, *LATER], ids=lambda case: case.name)
def test_at_length(case, simulated, against_float64):
    against_float64("grouped_matmul", "tpu", case, range(2, 20))


lay_out = jax.jit(tpu.lay_out, static_argnums=(1, 2))


def even(case, sizes):
    return case.make(0) | {"sizes": jnp.asarray(sizes, jnp.int32)}


@pytest.mark.parametrize(
    ("case", "sizes", "most"),
    [
        (Case("few", 12, 4, 1024, 512, "bfloat16"), [5, 0, 6, 1], 1.1),
        pytest.param(Case("codes", 12, 4, 1024, 1024, "bfloat16", "int8"), [0, 12, 0, 0], 1.1, marks=pytest.mark.ci),
        pytest.param(Case("many", 128, 2, 512, 512, "bfloat16"), [64, 64], 1.3, marks=pytest.mark.ci),
    ],
)
def test_bytes_that_are_copied(case, sizes, most, simulated):
    """Weights of groups without rows are not read, others once; of a block of few rows what is padding counts as copied."""
    inputs = even(case, sizes)
    with tensorcore.counted() as found:
        case.run(inputs, "tpu").block_until_ready()
    assert case.cost(inputs).bytes - inputs["sizes"].nbytes <= sum(found) <= most * case.cost(inputs).bytes


def test_rows_lie_in_blocks_of_their_group():
    plan = tpu.Plan(tpu.Sizes(4, 128, 128), 5, 1, 1)
    layout = lay_out(jnp.asarray([5, 0, 3], jnp.int32), 9, plan)
    assert layout.used.tolist() == [3] and layout.groups[:3].tolist() == [0, 0, 2]
    assert layout.places[:8].tolist() == [0, 1, 2, 3, 4, 8, 9, 10]
    assert np.array_equal(layout.rows[layout.places[:8]], np.arange(8))


@pytest.mark.parametrize("sizes", [[0, 0, 0], [7, 0, 0], [1, 2, 4], [0, 0, 7], [7, 7, 7]])
def test_there_are_always_enough_blocks(sizes):
    rows = 21
    plan = tpu.Plan(tpu.Sizes(4, 128, 128), min(rows // 4 + 3, rows), 1, 1)
    layout = lay_out(jnp.asarray(sizes, jnp.int32), rows, plan)
    assert layout.used[0] == sum(-(-size // 4) for size in sizes) <= plan.blocks
    real = sum(sizes)
    assert np.array_equal(layout.rows[layout.places[:real]], np.arange(real))
    assert len(set(layout.places[:real].tolist())) == real


def test_refusals_and_sizes():
    for case in TUNING:
        key = case.tuning_key()
        assert tpu.heuristic("tpu", key) in tpu.candidates("tpu", key)
        sizes = tpu.Sizes(**tpu.heuristic("tpu", key))
        assert sizes.rows * case.features * 2 <= tpu.X_BYTES and case.features % sizes.step == 0
    key = TUNING[0].tuning_key()
    assert dispatch.choose("grouped_matmul", "auto", V5E, key) == "tpu"
    assert "not 96 and" in tpu.refusal(V5E, key | {"in": 96})
    assert "not 4096 and 200" in tpu.refusal(V5E, key | {"out": 200})
    assert "not in float16" in tpu.refusal(V5E, key | {"dtype": "float16"})
