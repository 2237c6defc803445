import pytest

from pallas_kernels import dispatch, tensorcore, tuning
from pallas_kernels.dispatch import Target
from pallas_kernels.flash_attention import tpu
from pallas_kernels.flash_attention.cases import EVERYTHING, PACKED, TUNING, Case

V5E = Target("tpu", "TPU v5 lite")
SMALL = tpu.Sizes(lines=64, keys=256, step=128)
SOON = [
    Case("chunk", batch=2, queries=50, keys=600, kv_heads=1, window=200, soft_cap=4.0, extras=EVERYTHING),
    Case("packed", batch=1, queries=140, keys=300, kv_heads=1, group=2, head_dim=128, dtype="bfloat16", extras=PACKED),
]


@pytest.mark.parametrize("case", SOON, ids=lambda case: case.name)
def test_small_blocks_against_float64(case, simulated, against_float64):
    with tuning.forced(SMALL._asdict()):
        against_float64("flash_attention", "tpu", case, range(7))


@pytest.mark.ci
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_blocks_at_length(head_dim, dtype, simulated, against_float64):
    case = Case("long", queries=133, keys=601, head_dim=head_dim, dtype=dtype, window=100, extras=EVERYTHING)
    with tuning.forced(SMALL._asdict()):
        against_float64("flash_attention", "tpu", case, range(10))


@pytest.mark.ci
def test_bytes_that_are_copied(simulated):
    case = Case("one", batch=1, queries=256, keys=256, kv_heads=1, group=4, head_dim=128, dtype="bfloat16")
    inputs = case.make(0)
    with tensorcore.counted() as found:
        case.run(inputs, "tpu").block_until_ready()
    assert case.cost(inputs).bytes <= sum(found) <= 1.3 * case.cost(inputs).bytes


def test_choice_and_sizes():
    for case in TUNING:
        key = case.tuning_key()
        assert tpu.heuristic("tpu", key) in tpu.candidates("tpu", key)
        assert dispatch.choose("flash_attention", "auto", V5E, key | {"dtype": "bfloat16"}) == "tpu"
    assert "float16" in tpu.refusal(V5E, {"dtype": "float16", "head_dim": 64})
    assert tpu.refusal(V5E, {"dtype": "bfloat16", "head_dim": 64}) is None
