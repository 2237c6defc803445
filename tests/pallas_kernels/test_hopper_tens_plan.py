"""How the weights of some tens of tokens' matmuls are dealt out."""

import pytest

from pallas_kernels import hopper

tens = pytest.importorskip("pallas_kernels.hopper_tens_plan")
Link = pytest.importorskip("pallas_kernels.hopper_folds").Link
LAYER = [Link(4096, 4096), Link(4096, 28672, True, 1e-5), Link(14336, 4096), Link(4096, 6144, False, 1e-5)]
SMALL = [Link(2048, 2048), Link(2048, 16384, True, 1e-5), Link(8192, 2048), Link(2048, 3072, False, 1e-5)]
ODD = [Link(1088, 1024), Link(1024, 4096, True, 1e-5), Link(2048, 1024)]  # 1,088 inputs are 17 times 64
CHAINS = {"8b": LAYER, "1b": SMALL, "odd": ODD}
KEY = {"tokens": 40, "dtype": "bfloat16", "weight": "bfloat16", "links": 1, "in0": 4096, "out0": 4096}


@pytest.fixture(autouse=True)
def a_card(monkeypatch):
    monkeypatch.setattr(hopper, "cores", lambda: 132)


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("sizes", tens.CANDIDATES)
def test_every_plan_covers_the_weights_and_fits(chain, sizes):
    plan = tens.plan_of(chain, 48, "bfloat16", sizes)
    assert plan.links == tuple(chain) and 106 <= plan.workers <= 132 and plan.workers % sizes.sharing == 0
    total = 0
    for number, link in enumerate(plan.links):
        deep, wide, size = plan.deep(number), plan.wide(number), plan.size(number)
        assert size * plan.halves(number) * plan.workers == link.outputs and size % 8 == 0 and size <= tens.WIDEST
        assert plan.length(number) * deep * 64 == plan.taken(number) * wide * 64 == link.inputs and deep % wide == 0
        assert size <= plan.slot_rows // deep and plan.slot_rows % (8 * deep) == 0  # a slot is as large whatever its depth
        assert 2 < plan.slots(wide) <= hopper.BARRIERS and plan.begins[number] == total
        total += plan.length(number) * plan.halves(number)
    assert plan.begins[-1] == total and 3 <= plan.stages <= hopper.BARRIERS
    shared = plan.stages * plan.slot_rows * 128 + tens.INPUTS + 128 * (max(plan.widths) + plan.streamed)
    assert shared + 1024 + 2048 <= hopper.SHARED_BYTES  # numbers of threads, factors, barriers


def test_an_8b_layer_is_dealt_out_evenly():
    plan = tens.plan_of(LAYER, 64, "bfloat16", tens.Sizes())
    assert plan.workers == 128 and [plan.size(number) for number in range(4)] == [32, 112, 32, 48]
    assert [plan.deep(number) for number in range(4)] == [4, 1, 4, 2] and [plan.wide(number) for number in range(4)] == [2, 1, 2, 2]
    assert plan.stages == 6 and plan.streamed == 32 and plan.before_norms == [0, 2]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"links": 2, "out0": 28672, "in1": 14336, "out1": 4096}, None),  # gated, as half of it goes on
        ({"tokens": 65}, "up to 64 tokens, not 65"),
        ({"weight": "int8"}, "tokens and weights in bfloat16, not bfloat16 and int8"),
        ({"dtype": "float16", "weight": "float16"}, "not float16 and float16"),
        ({"in0": 4096 + 32}, "inputs in multiples of 64, not 4128"),
        ({"out0": 832}, "falls to 106 to 132 multiprocessors in equal multiples of 8 results, 144 at most, not 832"),
        ({"out0": 32768}, "144 at most, not 32768"),
    ],
)
def test_what_it_refuses(changes, reason):
    found = tens.refusal(KEY | changes)
    assert found is None if reason is None else reason in found


def test_tokens_are_filled_up_to_halves_that_two_blocks_copy():
    assert [tens.padded(tokens) for tokens in (2, 17, 32, 33, 64)] == [16, 32, 32, 48, 64]
