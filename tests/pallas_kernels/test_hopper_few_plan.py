"""How the weights of a few tokens' matmuls are folded and dealt out."""

import pytest

from pallas_kernels import hopper

few = pytest.importorskip("pallas_kernels.hopper_few_plan")
folds = pytest.importorskip("pallas_kernels.hopper_folds")
Link = folds.Link
LAYER = [Link(4096, 4096), Link(4096, 28672, True, 1e-5), Link(14336, 4096), Link(4096, 6144, False, 1e-5)]
LARGE = [Link(8192, 8192), Link(8192, 57344, True, 1e-5), Link(28672, 8192), Link(8192, 10240, False, 1e-5)]
ODD = [Link(896, 896), Link(896, 9728, True, 1e-5), Link(4864, 896), Link(896, 1152, False, 1e-5)]
CHAINS = {"8b": LAYER, "70b": LARGE, "odd": ODD, "small": [Link(256, 64)]}
KEY = {"tokens": 8, "dtype": "bfloat16", "weight": "bfloat16", "links": 1, "in0": 4096, "out0": 4096}


@pytest.fixture(autouse=True)
def a_card(monkeypatch):
    monkeypatch.setattr(hopper, "cores", lambda: 132)


def plan_of(chain, tokens=16, sizes=few.CANDIDATES[0]):
    return few.plan_of(chain, tokens, "bfloat16", sizes)


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("tokens", [8, 16])
@pytest.mark.parametrize("sizes", few.CANDIDATES)
def test_every_plan_covers_the_weights_and_fits(chain, tokens, sizes):
    plan = plan_of(chain, tokens, sizes)
    assert plan.links == tuple(chain) and 115 <= plan.workers <= 132 and 1 <= plan.flying < plan.stages
    for number, (link, fold) in enumerate(zip(plan.links, plan.folds, strict=True)):
        assert plan.tiles(number) * fold.rows == link.outputs and fold.parts * fold.rows == 64
        assert fold.parts * fold.length * fold.block == link.inputs and fold.block == few.BLOCK
        assert fold.rows // plan.halves(number) * tokens % 128 == 0  # each thread has as many numbers as any other
        assert plan.slots(number) * plan.columns(number) * few.BLOCK * 2 <= plan.room and plan.slots(number) >= 2
        assert plan.most(number) * plan.columns(number) * 64 * 4 <= plan.room
    assert plan.sums <= few.MOST_SUMS and plan.stages * few.SLOT + plan.room <= hopper.SHARED_BYTES - 4096


@pytest.mark.parametrize("cores", [132, 114, 78, 60, 16])
@pytest.mark.parametrize("tokens", [8, 16])
def test_there_are_no_more_barriers_than_a_kernel_may_have(monkeypatch, cores, tokens):
    """Whatever there is no room for is refused."""
    monkeypatch.setattr(hopper, "cores", lambda: cores)
    refused = 0
    for chain in (LAYER, LARGE, ODD, [Link(5120, 5120), Link(5120, 51200, True, 1e-5), Link(25600, 5120), Link(5120, 10240, False, 1e-5)]):
        try:
            plan = plan_of(chain, tokens)
        except ValueError:
            refused += 1
            continue
        assert max(map(plan.slots, range(len(chain)))) <= 32 and plan.sums <= few.MOST_SUMS
    assert refused <= (4 if cores == 16 else 3)


def test_squares_are_summed_by_warps():
    plan = plan_of([Link(128, 512, gated=True), Link(256, 256, epsilon=1e-5)], 8)
    assert plan.folds[0].rows == 64 and plan.halves(0) == 2 and plan.squares(0) == 8
    assert plan_of([Link(128, 512), Link(512, 256, epsilon=1e-5)], 8).squares(0) == 16


def test_the_op_joins_as_many_tokens_as_there_is_a_kernel_for():
    from pallas_kernels.token_chain import api

    assert api.MOST == few.MOST


@pytest.mark.parametrize(("tokens", "stages"), [(8, 11), (16, 9)])
def test_an_8b_layer_is_dealt_out_evenly(tokens, stages):
    plan = plan_of(LAYER, tokens)
    assert [plan.most(number) * fold.rows for number, fold in enumerate(plan.folds)] == [32, 224, 32, 48]
    assert plan.workers == 128 and plan.stages == stages and plan.before_norms == [0, 2]
    assert (plan.parts, plan.copies) == (4, 4) and [plan.squares(number) for number in (0, 2)] == [tokens, tokens]
    assert all(plan.tiles(number) % plan.workers == 0 for number in range(4))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"weight": "int8"}, "tokens and weights in bfloat16, not bfloat16 and int8"),
        ({"tokens": 17}, "up to 16 tokens, not 17"),
        ({"tokens": 1}, "up to 16 tokens, not 1"),
        ({"dtype": "float16", "weight": "float16"}, "not float16 and float16"),
        ({"in0": 4096 + 64}, "inputs in multiples of 128 and outputs in multiples of 64, of some links of 32 or 16, not 4160 and 4096"),
        ({"out0": 4096 + 8}, "not 4096 and 4104"),
        ({"out0": 1 << 20, "tokens": 16}, "no room for 1048576 outputs of 16 tokens"),
    ],
)
def test_what_it_refuses(changes, reason):
    found = few.refusal(KEY | changes)
    assert found is None if reason is None else reason in found


def test_tokens_are_filled_up():
    assert [few.padded(tokens) for tokens in (2, 8, 9, 16)] == [8, 8, 16, 16]
